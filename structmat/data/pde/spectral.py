"""Fourier modes of real periodic fields, in the layout of rfftn: all wavenumbers but on the last axis, which has half."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def wavenumbers(size: int, dimensions: int) -> tuple[np.ndarray, ...]:
    """float64 whole wavenumbers of each axis, shaped so that they broadcast over an rfftn of (size,) * dimensions."""
    full, half = np.fft.fftfreq(size, 1 / size), np.arange(size // 2 + 1.0)
    return tuple(np.ix_(*[full] * (dimensions - 1), half))


def unaliased(size: int, dimensions: int) -> np.ndarray:
    """bool: modes below a third of the grid on every axis; products of two such fields are exact on these modes."""
    return np.all(np.broadcast_arrays(*(3 * np.abs(k) < size for k in wavenumbers(size, dimensions))), axis=0)


def shared(size: int, new: int, dimensions: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where the modes that two grids share lie in the rfftn of each, as indices of its last axes.

    The mode at half the smaller size has no partner of the other sign there and is left out.
    """
    top = (min(size, new) - 1) // 2
    both, half = np.r_[0 : top + 1, -top:0], np.arange(top + 1)
    return tuple((..., *np.ix_(*[both % n] * (dimensions - 1), half)) for n in (size, new))


def refined(modes: jax.Array, size: int, new: int, dimensions: int) -> jax.Array:
    """(..., new, new // 2 + 1) or alike: the rfftn of a grid of `size` points a side, on one of `new`, norm "forward"."""
    old_place, new_place = shared(size, new, dimensions)
    shape = modes.shape[: modes.ndim - dimensions] + (new,) * (dimensions - 1) + (new // 2 + 1,)
    return jnp.zeros(shape, modes.dtype).at[new_place].set(modes[old_place])
