"""A user's own tokens: a folder of `experiments.tokenize`, `.npy` of token ids, `.jsonl` with a "text" field, or a folder of
text files."""

import hashlib
from pathlib import Path

import numpy as np

from structmat.data import bytes_text, tokens
from structmat.data.corpus import Corpus, from_documents, make_corpus, tail_split
from structmat.data.errors import DataError
from structmat.data.json_lines import texts

NPY_DTYPES = ("uint8", "uint16", "int32")


def load_tokens(path: str | Path, glob: str = "**/*.txt") -> Corpus:
    """Reads a corpus by what `path` is.

    - `x.npy`: 1-d ids of dtype uint8, uint16 or int32, memory-mapped; the last tenth is held out; vocab = largest id + 1.
    - `x.jsonl`: one JSON object a line with a string field "text", as UTF-8 bytes; documents held out by hash of the text,
      so copies of one document stay on one side.
    - a folder with tokens.json: `tokens.read(path)`, memory-mapped.
    - any other folder: `bytes_text.load(path, glob)`.

    Raises:
      DataError: path is missing or of another kind, or the content is not as above (names the line).
    """
    path = Path(path)
    if (path / tokens.INDEX).is_file():
        return tokens.read(path)
    if path.is_dir():
        return bytes_text.load(path, glob)
    if not path.is_file():
        raise DataError(f"no data at {str(path)!r}: it does not exist; give a folder of text, a .jsonl or a .npy file")
    if path.suffix not in (".npy", ".jsonl"):
        raise DataError(f"cannot read {str(path)!r} as text; valid: a folder of text, a .jsonl or a .npy file")
    return _npy(path) if path.suffix == ".npy" else _jsonl(path)


def _npy(path: Path) -> Corpus:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise DataError(f"{str(path)!r} is not a readable .npy file: {e}") from e
    if ids.dtype.name not in NPY_DTYPES or ids.ndim != 1:
        raise DataError(
            f"{str(path)!r} holds {ids.dtype.name} of shape {ids.shape}; "
            f"token ids must be 1-d and of dtype {', '.join(NPY_DTYPES)}"
        )
    if len(ids) < 2:
        raise DataError(f"{str(path)!r} holds {len(ids)} tokens; at least 2 are needed to split off a held-out part")
    if ids.min() < 0:
        raise DataError(f"{str(path)!r} holds the token id {ids.min()}; ids must be >= 0")
    return make_corpus(*tail_split(ids), int(ids.max()) + 1, f"{path.name}: {len(ids)} {ids.dtype.name} tokens")


def _jsonl(path: Path) -> Corpus:
    documents = []
    with path.open("rb") as lines:
        for text in texts(lines, path):
            if text:
                data = text.encode("utf-8", "surrogatepass")
                documents.append((hashlib.sha256(data).hexdigest(), data))
    if not documents:
        raise DataError(f'{str(path)!r} holds no document; each line must be {{"text": "..."}}')
    return from_documents(documents, f"{path.name}: {len(documents)} documents")
