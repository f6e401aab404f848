"""How far predicted fields are from true ones, and at which scales; fields are real and periodic on [0, length)^d.

Pure functions of arrays in any layout: `axes` names the axes of space, all others are samples, times, channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SPACE = (-2, -1)


def relative_l2(prediction: jax.Array, truth: jax.Array, axes: tuple[int, ...] = SPACE) -> jax.Array:
    """|prediction - truth| / |truth| of each field, over the axes of space, which are gone from the result."""
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axes))
    return norm(prediction - truth) / norm(truth)


def relative_h1(
    prediction: jax.Array, truth: jax.Array, axes: tuple[int, ...] = SPACE, length: float = 1.0
) -> jax.Array:
    """As `relative_l2`, in the norm (|u|^2 + |grad u|^2)^(1/2), the gradient exact for the modes of the grid."""
    weight = 1 + _squares(truth.shape, axes, 2 * math.pi / length)
    norm = lambda a: jnp.sqrt(jnp.sum(jnp.asarray(weight, a.dtype) * _power(jnp.fft.fftn(a, axes=axes)), axes))
    return norm(prediction - truth) / norm(truth)


def energy_spectrum(field: jax.Array, axes: tuple[int, ...] = SPACE) -> jax.Array:
    """(..., shells): half the squared Fourier coefficients, summed over wavenumbers k - 1/2 <= |k| < k + 1/2, k = 0, 1, ...

    Up to the corner of the grid of wavenumbers, so that the sum over shells is half the mean square of the field.
    """
    return _shells(field, axes, np.ones(()))


def kinetic_spectrum(vorticity: jax.Array, axes: tuple[int, int] = SPACE, length: float = 1.0) -> jax.Array:
    """(..., shells): `energy_spectrum` of both components of the velocity, together, of a flow in two dimensions."""
    squares = _squares(vorticity.shape, axes, 2 * math.pi / length)
    return _shells(vorticity, axes, np.divide(1, squares, out=np.zeros_like(squares), where=squares > 0))


class Growth(NamedTuple):
    """`errors` relative L2 (..., times); `rate` (...): d log(error) / d time, by least squares."""

    errors: jax.Array
    rate: jax.Array


def error_growth(
    prediction: jax.Array, truth: jax.Array, times: np.ndarray, time_axis: int = 1, axes: tuple[int, ...] = SPACE
) -> Growth:
    """Relative L2 error of each snapshot, and how fast it grows.

    Args:
      times: (times,), at least two, all different. time_axis: of both arrays, which have space on `axes`.

    Raises:
      ValueError: the times do not fit the axis, or are fewer than two.
    """
    times = np.asarray(times, np.float64)
    count = truth.shape[time_axis]
    if times.shape != (count,) or len(np.unique(times)) < 2:
        raise ValueError(
            f"times {times.tolist()} for {count} snapshots; needed are as many, at least two of them different"
        )
    space = tuple(axis % truth.ndim for axis in axes)
    errors = relative_l2(prediction, truth, axes)
    errors = jnp.moveaxis(errors, time_axis % truth.ndim - sum(axis < time_axis % truth.ndim for axis in space), -1)
    centred = times - times.mean()
    slope = jnp.asarray(centred / np.sum(centred**2), errors.dtype)
    return Growth(errors, jnp.sum(slope * jnp.log(errors), -1))


def _shells(field: jax.Array, axes: tuple[int, ...], weight: np.ndarray) -> jax.Array:
    shape = [field.shape[axis] for axis in axes]
    shell = np.rint(np.sqrt(_squares(field.shape, axes, 1.0))).astype(np.int32)
    power = 0.5 * jnp.asarray(weight, field.dtype) * _power(jnp.fft.fftn(field, axes=axes, norm="forward"))
    flat = jnp.moveaxis(power, axes, range(-len(axes), 0)).reshape(*_others(field.shape, axes), math.prod(shape))
    order = np.moveaxis(shell, axes, range(-len(axes), 0)).reshape(-1)
    return jnp.zeros((*flat.shape[:-1], int(order.max()) + 1), flat.dtype).at[..., order].add(flat)


def _power(modes: jax.Array) -> jax.Array:
    return modes.real**2 + modes.imag**2


def _others(shape: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    space = {axis % len(shape) for axis in axes}
    return [size for i, size in enumerate(shape) if i not in space]


def _squares(shape: tuple[int, ...], axes: tuple[int, ...], unit: float) -> np.ndarray:
    """float64 |unit k|^2, of size 1 on the axes that are not space."""
    squares = np.zeros([1] * len(shape))
    for axis in axes:
        k = unit * np.fft.fftfreq(shape[axis], 1 / shape[axis])
        squares = squares + (k**2).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return squares
