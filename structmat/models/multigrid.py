"""Multi-grid domain decomposition (Kossaifi et al. 2023): patches that see their surroundings ever coarser.

The domain is a torus. With L levels every axis is cut into 2^L patches, and a patch carries L + 1 windows of one shape,
side by side as channels: itself with a margin, then for l = 1 ... L the domain at every 2^l-th point, centred on the patch.
Patches are rows of the batch, so any model takes them, and a mesh that splits the batch splits the domain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def margin_points(fraction: float, space: Sequence[int], name: str = "margin") -> tuple[int, ...]:
    """Points of margin on either side, per axis: round(fraction * n), of the WHOLE side as in the authors' library."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name}={fraction} must be a fraction of the whole side in [0, 1]")
    return tuple(round(fraction * n) for n in space)


def patch(x: jax.Array, levels: int, margin: int | Sequence[int] = 0) -> jax.Array:
    """Cut a batch into patches.

    Args:
      x: `(batch, *space, channels)`. Every side must divide by 4^levels: 2^levels patches whose width the coarsest grid
        still resolves.
      levels: L; 0 keeps one patch, the domain with its margin.
      margin: points added on either side of a patch, and of its coarser windows, taken around the torus; one per axis or
        one for all.

    Returns:
      `(batch * 2^(L d), *(n / 2^L + 2 margin), channels * (L + 1))` for d axes, the patches of an image adjacent and row by
      row. The first `channels` are the plain patches.

    Raises:
      ValueError: sides that do not divide, or a negative number.
    """
    space, channels = x.shape[1:-1], x.shape[-1]
    margins = _margins(levels, margin, len(space))
    for axis, n in enumerate(space):
        if n % 4**levels:
            raise ValueError(f"levels={levels}: axis {axis} of {space} must divide by {4**levels}; {n} does not")
    windows = []
    for level in range(levels + 1):
        cut = x
        for axis, (n, m) in enumerate(zip(space, margins)):
            cut = jnp.take(cut, points(n, levels, level, m), axis=1 + 2 * axis, mode="clip")  # axis -> (patch, point)
        windows.append(cut)
    cut, axes = jnp.concatenate(windows, axis=-1), len(space)
    order = (0, *(1 + 2 * k for k in range(axes)), *(2 + 2 * k for k in range(axes)), 1 + 2 * axes)
    cut = cut.transpose(order)
    return cut.reshape(-1, *cut.shape[1 + axes : -1], channels * (levels + 1))


def stitch(y: jax.Array, levels: int, margin: int | Sequence[int] = 0) -> jax.Array:
    """Put patches together, their margins cut off; `stitch(patch(x))` begins with the channels of x, unchanged.

    Args:
      y: `(batch * 2^(levels d), *side, channels)`, as `patch` orders them.

    Returns:
      `(batch, *space, channels)`.

    Raises:
      ValueError: a number of patches, or a margin, that does not fit.
    """
    side, channels = y.shape[1:-1], y.shape[-1]
    axes, n = len(side), 2**levels
    margins = _margins(levels, margin, axes)
    if y.shape[0] % n**axes or any(s <= 2 * m for s, m in zip(side, margins)):
        raise ValueError(f"stitch: {y.shape} are not patches of {levels} levels with a margin of {margins}")
    y = y[(slice(None), *(slice(m, s - m) for s, m in zip(side, margins)))]
    inner = y.shape[1:-1]
    y = y.reshape(-1, *(n,) * axes, *inner, channels)
    order = (0, *(a for k in range(axes) for a in (1 + k, 1 + axes + k)), 1 + 2 * axes)
    return y.transpose(order).reshape(-1, *(n * s for s in inner), channels)


def points(length: int, levels: int, level: int, margin: int) -> np.ndarray:
    """Which points of an axis the windows of one level read: int (2^levels patches, length / 2^levels + 2 margin).

    On the grid of every 2^level-th point a patch is `stride` = length / 2^(levels + level) wide and its window, which has
    as many points at every level, begins ceil((length / 2^levels - stride) / 2) + margin before it.
    """
    patches, step = 2**levels, 2**level
    width, stride = length // patches, length // (patches * step)
    before = math.ceil((width - stride) / 2) + margin
    start = np.arange(patches)[:, None] * stride - before
    return (start + np.arange(width + 2 * margin)) * step % length


def _margins(levels: int, margin: int | Sequence[int], axes: int) -> tuple[int, ...]:
    margins = (margin,) * axes if isinstance(margin, int) else tuple(margin)
    if levels < 0 or len(margins) != axes or any(m < 0 for m in margins):
        raise ValueError(
            f"levels={levels}, margin={margin!r}: must not be negative, one margin or one for each of {axes} axes"
        )
    return margins
