"""Unigram and bigram references in bits per token: what a language model has to beat before it has learned anything."""

import numpy as np

from structmat.data.errors import DataError

CANDIDATES = tuple(10.0**e for e in range(-4, 3))


def unigram_bits_per_byte(
    train: np.ndarray, heldout: np.ndarray, smoothing: float = 1.0, vocab_size: int = 256
) -> float:
    """Mean -log2 p(token) over `heldout`, p from counts in `train` plus the constant `smoothing` > 0."""
    _check(smoothing, train, heldout)
    counts = np.bincount(heldout, minlength=vocab_size)
    return float(-(counts @ _log2_unigram(train, smoothing, vocab_size)) / len(heldout))


def bigram_bits_per_byte(
    train: np.ndarray, heldout: np.ndarray, smoothing: float | None = None, vocab_size: int = 256
) -> float:
    """Mean -log2 p(token | previous token) over `heldout[1:]`.

    p(b | a) = (count(a, b) + smoothing * vocab * p1(b)) / (count(a) + smoothing * vocab), with p1 the add-one unigram of
    `train`: constant-weight backing off, so that an unseen pair costs what its token costs. With p1 uniform this is
    add-constant smoothing.

    Args:
      train, heldout: 1-d integer tokens below vocab_size, at least two each.
      smoothing: > 0; None chooses it from CANDIDATES on the last tenth of train alone (`choose_smoothing`).
      vocab_size: number of token ids; memory is its square.
    """
    if smoothing is None:
        smoothing = choose_smoothing(train, vocab_size)
    _check(smoothing, train, heldout)
    prior = smoothing * vocab_size * np.exp2(_log2_unigram(train, 1.0, vocab_size))
    counts = _pairs(train, vocab_size)
    bits = np.log2(counts.sum(1, keepdims=True) + prior.sum()) - np.log2(counts + prior)
    seen = _pairs(heldout, vocab_size)
    return float((seen * bits).sum() / seen.sum())


def choose_smoothing(train: np.ndarray, vocab_size: int = 256) -> float:
    """The candidate with the fewest bits on the last tenth of train when counted on the rest; no held-out token is read."""
    cut = len(train) - max(2, len(train) // 10)
    return min(CANDIDATES, key=lambda s: bigram_bits_per_byte(train[:cut], train[cut:], s, vocab_size))


def _check(smoothing: float, *parts: np.ndarray) -> None:
    if not smoothing > 0:
        raise DataError(f"smoothing is {smoothing}; it must be > 0, or an unseen token costs infinitely many bits")
    for part in parts:
        if len(part) < 2:
            raise DataError(f"an n-gram needs at least 2 tokens in each part; one has {len(part)}")


def _log2_unigram(train: np.ndarray, smoothing: float, vocab_size: int) -> np.ndarray:
    counts = np.bincount(train, minlength=vocab_size) + smoothing
    return np.log2(counts / counts.sum())


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
