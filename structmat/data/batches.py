"""Batches as pure functions of (seed, step): no iterator state to save, any process can make any rows of any step."""

from collections.abc import Iterator
from functools import lru_cache

import grain
import numpy as np

from structmat.data.errors import DataError


@lru_cache(maxsize=16)
def _shuffled(size: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(size).seed(seed).shuffle()


def shuffled_indices(size: int, seed: int, step: int, batch: int, rows: range | None = None) -> np.ndarray:
    """int32 (len(rows),): entries step*batch + row of an endless sequence of fresh permutations of range(size).

    grain's shuffle is an index-to-index function, so nothing is stored and every index is used once per epoch; about
    0.2 ms for 16 rows.

    Args:
      size: number of things to choose from, 1 <= size < 2**31.
      seed: 0 <= seed < 2**32.
      step: >= 0; the only clock.
      batch: rows of the whole batch over all processes.
      rows: the rows wanted here, within range(batch); None is all of them.
    """
    rows = range(batch) if rows is None else rows
    if not 1 <= size < 2**31:
        raise DataError(f"cannot choose from {size} examples; 1 <= size < 2**31 is needed")
    if not 0 <= seed < 2**32:
        raise DataError(f"data seed is {seed}; valid: 0 <= seed < 2**32")
    if step < 0 or batch < 1:
        raise DataError(f"step is {step} and batch {batch}; valid: step >= 0, batch >= 1")
    if len(rows) and not 0 <= min(rows) <= max(rows) < batch:
        raise DataError(f"rows {rows} are not all within a batch of {batch}")
    order = _shuffled(int(size), int(seed))
    return np.array([order[int(step) * int(batch) + row] % size for row in rows], np.int32)


def lm_batch(
    tokens: np.ndarray, seed: int, step: int, batch: int, context: int, rows: range | None = None
) -> dict[str, np.ndarray]:
    """`{"tokens": int32 (len(rows), context + 1)}`: windows at uniformly drawn positions of a 1-d token array.

    Positions are drawn without replacement until every window of the corpus was seen; inputs are `[:, :-1]`, targets
    `[:, 1:]`. See `shuffled_indices` for seed, step, batch and rows.

    Raises:
      DataError: fewer than context + 1 tokens, or an argument out of range.
    """
    starts = shuffled_indices(_windows(tokens, context), seed, step, batch, rows)
    return {"tokens": _gather(tokens, starts, context)}


def heldout_batches(
    tokens: np.ndarray, batch: int, context: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Windows in order such that no target is scored twice; yields `{"tokens": int32 (batch, context + 1)}`.

    Window i starts at i*context, so its last target is the next one's first input. All windows are yielded, at most
    `limit` batches of them; an incomplete last batch is left out, except that fewer than `batch` windows in all is an
    error.
    """
    if batch < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch is {batch} and limit {limit}; both must be >= 1")
    count = (_windows(tokens, context) - 1) // context + 1
    if count < batch:
        raise DataError(
            f"the held-out part has {len(tokens)} tokens: {count} windows of context {context}, "
            f"but one batch needs {batch}; use batch <= {count}, a shorter context or more data"
        )
    batches = count // batch if limit is None else min(limit, count // batch)
    starts = np.arange(batches * batch, dtype=np.int64).reshape(batches, batch) * context
    return ({"tokens": _gather(tokens, s, context)} for s in starts)


def _windows(tokens: np.ndarray, context: int) -> int:
    if context < 1:
        raise DataError(f"context is {context}; it must be >= 1")
    if np.ndim(tokens) != 1 or len(tokens) <= context:
        raise DataError(
            f"tokens have shape {np.shape(tokens)}; a window of context {context} needs a 1-d array of at least {context + 1}"
        )
    return len(tokens) - context


def _gather(tokens: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(context + 1)].astype(np.int32)
