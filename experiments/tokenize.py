"""Turn text into tokens on disk, once: WikiText-103, OpenWebText, C4, or anybody's own.

    pip install 'structmat[text]'
    python -m experiments.tokenize --text=data/wikitext103/train --heldout_text=data/wikitext103/valid \\
        --tokenizer=data/gpt2 --out=data/wikitext103/tokens
    python -m experiments.tokenize --text=data/c4 --tokenizer=data/t5-base/tokenizer.json --out=data/c4_tokens
    python -m experiments.train --config=configs/gpt2.py:small --config.data.root=data/wikitext103/tokens --workdir=runs/x

`--text` is a file, or a folder of .txt (a document each), .jsonl and .json.gz files (a document a line, in the field
`--field`). `--tokenizer` is a Hugging Face tokenizer.json, or a folder with it or with vocab.json and merges.txt. Without
`--heldout_text` one document in `--heldout` is held out, by a hash of its text (of a .txt: its path). Every document ends
with `--end`; a .txt is encoded in pieces of whole lines, about a megabyte each.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app
from rich.progress import Progress

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.data.errors import DataError
from structmat.data.json_lines import texts
from structmat.data.tokens import INDEX, TokenWriter, write_index

flags = OwnFlags()
TEXT = flags.DEFINE_string("text", None, "File or folder of text.")
HELDOUT_TEXT = flags.DEFINE_string("heldout_text", None, "File or folder of held-out text; default: a share of --text.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer.json, or a folder with it or with vocab.json and merges.txt."
)
OUT = flags.DEFINE_string("out", None, "Folder to write train.bin, heldout.bin and tokens.json to.")
FIELD = flags.DEFINE_string("field", "text", "Field of a line of JSON that holds the text.")
END = flags.DEFINE_string("end", "", "Token after every document; '' is the first of <|endoftext|> and </s> there is.")
HELDOUT = flags.DEFINE_integer("heldout", 200, "Hold out one document in this many.", lower_bound=2)

ENDS = ("<|endoftext|>", "</s>", "<eos>")
KINDS = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".txt.gz")
TOGETHER = 256
"""Pieces the tokenizer encodes at once, on all cores."""
PIECE = 2**20
"""Characters of a piece of a .txt."""


class Piece(NamedTuple):
    """Text, the document it belongs to, and whether that ends with it."""

    text: str
    document: str
    ends: bool


def documents(place: Path, field: str) -> Iterator[Piece]:
    """The texts of a file or folder, in the order of their paths.

    Raises:
      DataError: nothing there, another kind of file, or a line that has no such field; names file and line.
    """
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if p.is_file() and p.name.endswith(KINDS)]
    else:
        files = [place] if place.is_file() else []
        if files and not place.name.endswith(KINDS):
            raise DataError(f"cannot read {str(place)!r} as text; valid: {', '.join(KINDS)}")
    if not files:
        raise DataError(f"no text at {str(place)!r}; give a file or folder of {', '.join(KINDS)}")
    for file in files:
        opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
        try:
            with opened as lines:
                yield from _pieces(file.name, lines) if ".txt" in file.suffixes else _rows(file, lines, field)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{str(file)!r} is not readable text: {error}") from error


def _pieces(name: str, lines: Iterator[str]) -> Iterator[Piece]:
    held: list[str] = []
    size = 0
    for line in lines:
        if held and size + len(line) > PIECE:
            yield Piece("".join(held), name, False)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield Piece("".join(held), name, True)


def _rows(file: Path, lines: Iterator[str], field: str) -> Iterator[Piece]:
    return (Piece(text, text, True) for text in texts(lines, file, field))


def load_tokenizer(place: Path) -> tuple[Any, str]:
    """(tokenizer, sha256 of its files).

    Raises:
      DataError: no tokenizer there, or the package that reads it is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("reading a tokenizer needs: pip install 'structmat[text]'") from error
    whole = place / "tokenizer.json" if place.is_dir() else place
    pair = [place / name for name in ("vocab.json", "merges.txt")]
    if whole.is_file():
        made, files = tokenizers.Tokenizer.from_file(str(whole)), [whole]
    elif all(p.is_file() for p in pair):
        made, files = tokenizers.ByteLevelBPETokenizer(*map(str, pair)), pair
    else:
        raise DataError(
            f"no tokenizer at {str(place)!r}; needed: tokenizer.json, or a folder with it or vocab.json and merges.txt"
        )
    return made, hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def end_of(tokenizer: Any, name: str) -> tuple[str, int]:
    """(name, id) of the token that ends a document.

    Raises:
      DataError: the tokenizer has none of the name.
    """
    for token in [name] if name else ENDS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return token, found
    raise DataError(
        f"--end={name!r}: the tokenizer has no such token" if name else f"the tokenizer has none of {ENDS}; give --end"
    )


def is_heldout(document: str, one_in: int) -> bool:
    """Whether a document is held out: the same on every machine, and for copies of one document."""
    return int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big") % one_in == 0


def run(
    text: Path, heldout_text: Path | None, tokenizer: Path, out: Path, field: str, end: str, one_in: int
) -> dict[str, Any]:
    """Write the folder; parts as `tokens.json` has them.

    Raises:
      DataError: as above; or the folder holds tokens already.
    """
    if (out / INDEX).exists():
        raise DataError(f"{str(out)!r} holds tokens already; give another --out, or remove it")
    made, digest = load_tokenizer(tokenizer)
    end_name, end_id = end_of(made, end)
    size = made.get_vocab_size()
    dtype = "<u2" if size <= 2**16 else "<i4"
    out.mkdir(parents=True, exist_ok=True)
    writers = {part: TokenWriter(out, part, np.dtype(dtype)) for part in ("train", "heldout")}
    sources = [(text, None)] if heldout_text is None else [(text, "train"), (heldout_text, "heldout")]
    with Progress(transient=True) as progress:
        bar = progress.add_task("tokens", total=None)
        for place, part in sources:
            pieces = documents(place, field)
            while some := list(itertools.islice(pieces, TOGETHER)):
                coded = made.encode_batch([piece.text for piece in some], add_special_tokens=False)
                for piece, found in zip(some, coded):
                    to = part or ("heldout" if is_heldout(piece.document, one_in) else "train")
                    progress.advance(bar, writers[to].add([*found.ids, end_id] if piece.ends else found.ids))
    parts = {part: writer.finish() for part, writer in writers.items()}
    about = {"tokenizer": tokenizer.name, "tokenizer_sha256": digest, "end": end_name, "text": text.name,
             "heldout": heldout_text.name if heldout_text else f"one document in {one_in}"}  # fmt: skip
    write_index(out, size, dtype, parts, about)
    return parts


def main(argv: Sequence[str]) -> None:
    """Tokenize."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    for name in ("text", "tokenizer", "out"):
        if flags.FLAGS[name].value is None:
            raise app.UsageError(f"--{name} is needed")
    heldout = Path(HELDOUT_TEXT.value) if HELDOUT_TEXT.value else None
    try:
        parts = run(
            Path(TEXT.value), heldout, Path(TOKENIZER.value), Path(OUT.value), FIELD.value, END.value, HELDOUT.value
        )
    except DataError as error:
        cli.fail(error)
    for part, found in parts.items():
        print(f"{part}: {found['tokens']:,} tokens")
    print(f"written: {OUT.value}; train with --config.data.root={OUT.value}")


if __name__ == "__main__":
    flags.run(main)
