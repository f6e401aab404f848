"""The same field on a coarser grid."""

from __future__ import annotations

import numpy as np

from structmat.data.errors import DataError
from structmat.data.pde.spectral import shared


def strided(fields: np.ndarray, resolution: int, dimensions: int, periodic: bool = True) -> np.ndarray:
    """(..., resolution, ...): every so many points of the last `dimensions` axes, equal in length.

    Args:
      periodic: the points are i / n; if not, i / (n - 1), edges included, which stay.

    Raises:
      DataError: the coarse points are not among the fine ones.
    """
    size, ends = fields.shape[-1], 0 if periodic else 1
    check_coarser(size, resolution, periodic)
    step = slice(None, None, (size - ends) // (resolution - ends))
    return fields[(..., *[step] * dimensions)]


def truncated(fields: np.ndarray, resolution: int, dimensions: int) -> np.ndarray:
    """(..., resolution, ...): the Fourier modes of a periodic field that the coarser grid resolves, no others.

    Raises:
      DataError: the grid is not coarser.
    """
    size = fields.shape[-1]
    if not 2 <= resolution <= size:
        raise DataError(f"{size} points a side cannot be cut to {resolution}; valid are 2 to {size}")
    if resolution == size:
        return fields
    axes = tuple(range(-dimensions, 0))
    modes = np.fft.rfftn(fields, axes=axes, norm="forward")
    old, new = shared(size, resolution, dimensions)
    shape = (*fields.shape[:-dimensions], *[resolution] * (dimensions - 1), resolution // 2 + 1)
    kept = np.zeros(shape, modes.dtype)
    kept[new] = modes[old]
    return np.fft.irfftn(kept, [resolution] * dimensions, axes, norm="forward").astype(fields.dtype)


def check_coarser(size: int, resolution: int, periodic: bool) -> None:
    """Raises DataError unless a grid of `size` points a side has all points of one of `resolution`."""
    ends = 0 if periodic else 1
    if not 1 < resolution <= size or (size - ends) % (resolution - ends):
        valid = [r for r in range(3, size + 1) if (size - ends) % (r - ends) == 0]
        raise DataError(f"{size} points a side do not contain a grid of {resolution}; valid are {valid}")
