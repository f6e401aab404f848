"""A token corpus split by document into train and held-out parts, with a hash of its content."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from structmat.data.errors import DataError

SEPARATOR = 0  # the byte between two documents; absent from text, so a model can see where a file ends
HELDOUT_ONE_IN = 10


@dataclass(frozen=True, eq=False)
class Corpus:
    """`train` and `heldout` are 1-d integer arrays of tokens in [0, vocab_size); `sha256` covers both and their split."""

    train: np.ndarray
    heldout: np.ndarray
    vocab_size: int
    sha256: str
    description: str


def is_heldout(name: str) -> bool:
    """True for about one name in ten: sha256(name) mod 10 == 0, the same on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big") % HELDOUT_ONE_IN == 0


def content_hash(*arrays: np.ndarray) -> str:
    """sha256 hex over dtype, shape and bytes of each array in turn; independent of memory layout and byte order."""
    digest = hashlib.sha256()
    for a in arrays:
        a = np.ascontiguousarray(a)
        little = a.astype(a.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{little.dtype.str}{little.shape};".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def make_corpus(train: np.ndarray, heldout: np.ndarray, vocab_size: int, description: str) -> Corpus:
    """A Corpus with its hash; raises DataError when a part is empty."""
    for name, part in (("train", train), ("held-out", heldout)):
        if not len(part):
            raise DataError(f"{description}: the {name} part is empty; more data is needed")
    return Corpus(train, heldout, vocab_size, content_hash(train, heldout), description)


def tail_split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last tenth (at least one token) is held out."""
    cut = len(tokens) - max(1, len(tokens) // HELDOUT_ONE_IN)
    return tokens[:cut], tokens[cut:]


def from_documents(documents: Sequence[tuple[str, bytes]], description: str) -> Corpus:
    """Joins (name, text) documents, in the order given, with a zero byte after each; uint8 tokens, vocabulary 256.

    Whole documents are held out, chosen by `is_heldout(name)`. Where that would leave either part empty (a single file,
    or a handful), the last tenth of every document is held out instead, and the description says so.
    """
    end = bytes([SEPARATOR])
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, text in documents:
        parts[is_heldout(name)].append(text + end)
    if not (parts[False] and parts[True]):
        parts = {False: [], True: []}
        for _, text in documents:
            cut = len(text) - max(1, len(text) // HELDOUT_ONE_IN)
            parts[False].append(text[:cut] + end)
            parts[True].append(text[cut:] + end)
        description += ", last tenth of each document held out"
    train, heldout = (np.frombuffer(b"".join(parts[side]), np.uint8) for side in (False, True))
    return make_corpus(train, heldout, 256, description)
