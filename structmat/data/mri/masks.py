"""Which samples of k-space are taken: lines, or points of a variable-density Poisson disc. Zero frequency first."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from structmat.data.errors import DataError

Pattern = Literal["random", "regular"]
GROWTH = 3.0
"""How much wider discs are at the edge of k-space than at its centre: 1 + GROWTH times."""
HALVINGS = 14
"""Of the interval of disc sizes."""


def acceleration(mask: np.ndarray) -> float:
    """Samples of the full grid per sample taken."""
    return mask.size / np.count_nonzero(mask)


def lines(
    shape: tuple[int, int], wanted: float, seed: int = 0, centre: float = 0.08, pattern: Pattern = "random"
) -> np.ndarray:
    """bool `shape`: round(columns / wanted) whole columns, those of the lowest frequencies among them.

    Args:
      wanted: acceleration, reached up to that rounding; `acceleration` reports it.
      centre: fraction of the columns, around zero frequency, that are all taken.
      pattern: the others are drawn `random`ly without replacement, or `regular`ly spaced from a random offset.

    Raises:
      DataError: an argument out of range, or an acceleration that the centre alone does not allow.
    """
    rows, columns = _checked(shape, wanted, seed, centre)
    if pattern not in ("random", "regular"):
        raise DataError(f"pattern is {pattern!r}; valid: 'random', 'regular'")
    draw = np.random.Generator(np.random.Philox(key=[seed, 2]))
    count, low = round(columns / wanted), round(centre * columns)
    _need_room(count, low, "columns", wanted, centre)
    taken = _middle(columns, low)
    others, more = np.flatnonzero(~taken), count - low
    if pattern == "random":
        chosen = draw.choice(others, more, replace=False)
    else:
        chosen = others[((np.arange(more) + draw.uniform()) * len(others) / max(more, 1)).astype(int)]
    taken[chosen] = True
    return np.fft.ifftshift(np.broadcast_to(taken, (rows, columns)))


@lru_cache(maxsize=16)
def poisson_disc(shape: tuple[int, int], wanted: float, seed: int = 0, centre: float = 0.1) -> tuple[np.ndarray, float]:
    """bool `shape`, read-only: round(size / wanted) samples, denser towards zero frequency; and the scale of its discs.

    Outside the centre no two samples are nearer than the smaller of their discs' radii, `radii(shape) * scale`. The scale is
    found by bisection: darts are thrown at all points in one random order, and of those that stay a few are taken away at
    random to reach the count.

    Args:
      wanted: acceleration; `acceleration` reports what is reached.
      centre: fraction of rows and of columns that make the block around zero frequency of which all is taken.

    Raises:
      DataError: an argument out of range, or an acceleration that the centre alone does not allow.
    """
    rows, columns = _checked(shape, wanted, seed, centre)
    draw = np.random.Generator(np.random.Philox(key=[seed, 3]))
    block = np.outer(_middle(rows, round(centre * rows)), _middle(columns, round(centre * columns)))
    count, low = round(rows * columns / wanted), np.count_nonzero(block)
    _need_room(count, low, "samples", wanted, centre)
    order = draw.permutation(np.flatnonzero(~block))
    relative = np.fft.fftshift(radii(shape))
    small, large = 0.0, float(max(shape))
    kept = order
    for _ in range(HALVINGS):
        scale = (small + large) / 2
        found = _darts(order, relative * scale)
        if len(found) >= count - low:
            small, kept = scale, found
        else:
            large = scale
    mask = block.copy()
    mask.flat[draw.permutation(kept)[: count - low]] = True
    mask = np.fft.ifftshift(mask)
    mask.flags.writeable = False
    return mask, small


def radii(shape: tuple[int, int]) -> np.ndarray:
    """Relative radii of the discs, 1 at zero frequency, growing linearly to 1 + GROWTH at the nearest edges."""
    y, x = (2 * np.fft.fftfreq(n) for n in shape)
    return 1 + GROWTH * np.hypot(y[:, None], x)


def _darts(order: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The flat indices of `order`, in turn, that no earlier one kept has within its reach."""
    columns = reach.shape[1]
    free = np.ones(reach.shape, bool)
    kept = []
    for index in order:
        i, j = divmod(int(index), columns)
        if not free[i, j]:
            continue
        kept.append(index)
        r = reach[i, j]
        if r > 1:
            k = int(r)
            top, left = max(i - k, 0), max(j - k, 0)
            window = free[top : i + k + 1, left : j + k + 1]
            di, dj = np.arange(window.shape[0]) + (top - i), np.arange(window.shape[1]) + (left - j)
            window &= (di * di)[:, None] + dj * dj >= r * r
    return np.array(kept, int)


def _middle(n: int, count: int) -> np.ndarray:
    """bool (n,): the `count` lowest frequencies of n that are in order, zero at n // 2."""
    start = n // 2 - count // 2
    return (np.arange(n) >= start) & (np.arange(n) < start + count)


def _checked(shape: tuple[int, int], wanted: float, seed: int, centre: float) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise DataError(f"a mask's shape is {shape}; two sizes of at least 1 are needed")
    if not wanted >= 1 or not 0 <= centre <= 1 or seed < 0:
        raise DataError(
            f"acceleration is {wanted}, centre {centre}, seed {seed}; valid: acceleration >= 1, 0 <= centre <= 1, seed >= 0"
        )
    return shape


def _need_room(count: int, low: int, what: str, wanted: float, centre: float) -> None:
    if count < max(low, 1):
        raise DataError(
            f"acceleration {wanted} leaves {count} {what}, but centre={centre} takes {low} already; lower one of the two"
        )
