"""A folder of tokens: `train.bin` and `heldout.bin`, memory-mapped, and `tokens.json`, which says what they hold.

Written once by `python -m experiments.tokenize`; a run reads the pages it needs, whatever the size of the corpus. Hashes
are taken while writing, so that none has to be taken over terabytes at the start of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from structmat.data.corpus import Corpus
from structmat.data.errors import DataError

INDEX, PARTS = "tokens.json", ("train", "heldout")
SCHEMA = 1


class TokenWriter:
    """Writes one part of a folder; `add` ids of documents, then `finish`."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype[Any]):
        self._path, self._dtype = folder / f"{part}.bin", np.dtype(dtype).newbyteorder("<")
        self._file: BinaryIO = self._path.with_suffix(".part").open("wb")
        self._digest, self._count, self._top = hashlib.sha256(), 0, -1

    def add(self, ids: Iterable[int]) -> int:
        """Append the ids of a document; how many they are.

        Raises:
          DataError: an id the dtype does not hold.
        """
        whole = np.asarray(list(ids), np.int64)
        if len(whole):
            self._top = max(self._top, int(whole.max()))
            if whole.min() < 0 or self._top > np.iinfo(self._dtype).max:
                raise DataError(f"{self._path}: ids {whole.min()} .. {whole.max()} do not fit {self._dtype.name}")
        data = whole.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._count += len(whole)
        return len(whole)

    def finish(self) -> dict[str, Any]:
        """Close, put in place, and say what was written: tokens, sha256, and the largest id."""
        self._file.close()
        os.replace(self._path.with_suffix(".part"), self._path)
        return {"tokens": self._count, "sha256": self._digest.hexdigest(), "largest": self._top}


def write_index(
    folder: Path, vocab_size: int, dtype: str, parts: dict[str, dict[str, Any]], about: dict[str, Any]
) -> None:
    """Write `tokens.json`, last of all: without it the folder holds no tokens.

    Args:
      parts: of `PARTS`, from `TokenWriter.finish`. about: where the tokens come from, for people.

    Raises:
      DataError: an id beyond the vocabulary, or an empty part.
    """
    for name in PARTS:
        if not parts[name]["tokens"]:
            raise DataError(f"{folder}: the {name} part is empty; more text is needed, or another share held out")
        if parts[name]["largest"] >= vocab_size:
            raise DataError(f"{folder}: {name} has the id {parts[name]['largest']}, but the vocabulary is {vocab_size}")
    fields = {"schema": SCHEMA, "vocab_size": vocab_size, "dtype": dtype, **parts, "about": about}
    path = folder / INDEX
    path.with_suffix(".part").write_text(json.dumps(fields, indent=1) + "\n")
    os.replace(path.with_suffix(".part"), path)


def read(folder: Path) -> Corpus:
    """The folder's tokens, memory-mapped.

    Raises:
      DataError: an index that is not one, or a file that is missing or of another length than it says.
    """
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text())
        vocab, dtype, parts = fields["vocab_size"], np.dtype(fields["dtype"]), [fields[name] for name in PARTS]
        counts, sums = [part["tokens"] for part in parts], [part["sha256"] for part in parts]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{str(path)!r} is not an index of tokens ({error!r}); write it again with experiments.tokenize"
        ) from error
    if fields.get("schema") != SCHEMA:
        raise DataError(f"{str(path)!r} has schema {fields.get('schema')}, this version reads {SCHEMA}; tokenize again")
    arrays = [_mapped(folder / f"{name}.bin", dtype, count) for name, count in zip(PARTS, counts)]
    digest = hashlib.sha256(f"{dtype.str};{vocab};{';'.join(sums)}".encode()).hexdigest()
    said = f"{folder.name}: {counts[0]:,} tokens and {counts[1]:,} held out, vocabulary {vocab:,}"
    return Corpus(*arrays, vocab, digest, said)


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> np.ndarray:
    found = path.stat().st_size if path.is_file() else None
    if found != count * dtype.itemsize:
        what = "is missing" if found is None else f"holds {found:,} bytes"
        raise DataError(f"{str(path)!r} {what}; its index says {count:,} tokens of {dtype.itemsize} bytes")
    return np.memmap(path, dtype, mode="r", shape=(count,))
