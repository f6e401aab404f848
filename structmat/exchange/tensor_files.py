"""Safetensors files: headers and parts of tensors read singly, and files written tensor by tensor in any order.

The library reads; it writes only files whose tensors are all in memory, so writing is done here, from the published format:
eight bytes with the length of a JSON header, the header, then the tensors' bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, makes bfloat16 a dtype numpy knows by name
import numpy as np

from structmat.data.errors import DataError
from structmat.structures.errors import suggest

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of the format -> numpy's; complex numbers are not among them."""
_NAMES = {name: code for code, name in DTYPES.items()}
_INT = 8
"""Bytes of the header's length, and what the header is padded to a multiple of."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, still on disk: its shape, its dtype as numpy names it, and the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    def read(self, *part: slice) -> np.ndarray:
        """The tensor, or a part of it; only these bytes are read.

        Raises:
          DataError: a damaged file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="numpy") as tensors:
                return tensors.get_slice(self.name)[part] if part else tensors.get_tensor(self.name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.file}: tensor {self.name!r} is not readable: {error}") from None


def tensors_in(place: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a folder of them (shards with an index, or one file), by name.

    Reads headers only.

    Raises:
      DataError: nothing there, a shard that is missing, cut short or no such file, a tensor that the index names and no
        shard holds, one name twice, a dtype beyond `DTYPES`, or no library safetensors.
    """
    place = Path(place)
    index = place / INDEX
    listed: Mapping[str, str] = {}
    if index.is_file():
        try:
            listed = json.loads(index.read_text())["weight_map"]
            files = [place / name for name in dict.fromkeys(listed.values())]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{index} is not an index of shards ({error!r}); download it again") from None
    else:
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise DataError(f"{str(place)!r} holds no .safetensors file{_instead(place)}")
    found: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing, and {INDEX} names it; download it again")
        for tensor in _header(file):
            if tensor.name in found:
                raise DataError(f"tensor {tensor.name!r} is both in {found[tensor.name].file.name} and in {file.name}")
            found[tensor.name] = tensor
    if gone := [name for name in listed if name not in found]:
        raise DataError(f"{str(place)!r}: no shard holds {', '.join(gone[:4])}, which {INDEX} lists")
    return found


def _instead(place: Path) -> str:
    bins = sorted(p.name for p in place.glob("*.bin")) if place.is_dir() else []
    if not bins:
        return "" if place.exists() else "; it does not exist"
    return f", only {bins[0]}: load it with transformers and save it by model.save_pretrained(folder)"


def _header(file: Path) -> Iterator[Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise DataError(f"reading {file} needs the library safetensors: pip install 'structmat[safetensors]'") from None
    try:
        with safe_open(file, framework="numpy") as tensors:
            about = [(n, tensors.get_slice(n)) for n in tensors.keys()]
            rows = [(n, tuple(s.get_shape()), s.get_dtype()) for n, s in about]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} is not a readable .safetensors file: {error}") from None
    for name, shape, code in rows:
        if code not in DTYPES:
            raise DataError(f"{file}: tensor {name!r} has dtype {code}" + suggest(code, DTYPES))
        yield Tensor(name, shape, DTYPES[code], file)


class TensorWriter:
    """A new `.safetensors` file whose tensors are written one by one, or in parts, in any order.

    Under another name until `finish`, so that no reader meets half a file.

    Args:
      path: of the file.
      tensors: name -> (shape, dtype as numpy names it); its order is that of the file, wider dtypes first.
      metadata: strings of the header.

    Raises:
      DataError: a dtype that the format does not have.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str]):
        for name, (_, dtype) in tensors.items():
            if dtype not in _NAMES:
                raise DataError(f"array {name!r} has dtype {dtype}, which safetensors has not" + suggest(dtype, _NAMES))
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        offset = 0
        for name in sorted(tensors, key=lambda n: -np.dtype(tensors[n][1]).itemsize):
            shape, dtype = tensors[name]
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = offset, tuple(shape), np.dtype(dtype)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _INT)
        self._begin = _INT + len(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("wb") as file:
            file.write(len(text).to_bytes(_INT, "little") + text)
            file.truncate(self._begin + offset)

    def write(self, name: str, value: np.ndarray, *part: slice) -> None:
        """Write a tensor, or a part of it, converted to its dtype.

        Raises:
          ValueError: another shape than declared.
        """
        offset, shape, dtype = self._places[name]
        if not math.prod(shape):
            return
        mapped = np.memmap(self._part, dtype, "r+", self._begin + offset, shape)
        target = mapped[part] if part else mapped
        if target.shape != value.shape:
            raise ValueError(f"{name}: an array of shape {value.shape} for {target.shape}")
        target[...] = value

    def finish(self) -> None:
        """Put the file in its place."""
        os.replace(self._part, self._path)
