"""A Fourier layer: low frequencies of the input, each times its own structured matrix (Li et al. 2021; Kossaifi et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.nn.leaves import declare
from structmat.nn.linear import PROBE
from structmat.nn.sharded import within_replica
from structmat.nn.sites import record
from structmat.structures import Structure, StructureError, parse
from structmat.structures.dense import Dense
from structmat.structures.fft import by_rows
from structmat.structures.fourier_weight import bind_fourier_weight
from structmat.structures.leaf import Axes, Shape, first_axis


class SpectralConv(nn.Module):
    """x real `(..., *space, cin)`, periodic -> `(..., *space, features)` of x's dtype.

    The one site is of kind `spectral`: (cin,) -> (features, *kept), complex. The same parameters apply on any grid that
    holds the modes. Leaves are complex, so gradients have to be conjugated before optax, as the training step does.

    Attributes:
      features: output channels.
      modes: frequencies per axis, both signs: along the last axis 0 .. m // 2 are kept (a real signal has the others),
        m // 2 + 1 of them; along any other -(m // 2) .. (m - 1) // 2.
      structure: recipe or its text: dense(), tucker(rank), cp(rank), tensor_train(rank), or fit of one.
      use_bias, param_dtype, bias_init: as in flax.linen.Dense.
      dtype: of the result; transforms and products are in f32 (f64 of f64 input).
      in_axes, out_axes: logical axis names for sharding.
      gain: factor on the initial weight.
    """

    features: int
    modes: Sequence[int]
    structure: Structure | str = "dense()"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    in_axes: Axes = None
    out_axes: Axes = None
    gain: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, cin, dtype = len(self.modes), x.shape[-1], self.dtype or x.dtype
        batch, space = x.shape[: -axes - 1], x.shape[-axes - 1 : -1]
        check_modes(self.modes, space, x.shape)
        bound = bind_fourier_weight(parse(self.structure), cin, (self.features, *kept(self.modes)))
        record(self.scope.path, bound, "spectral", self.in_axes, self.out_axes)
        params = declare(self, bound, self.in_axes, self.out_axes, self.param_dtype, self.gain)
        params = within_replica(bound, params, self.in_axes, self.out_axes)
        x = x.reshape(-1, *space, cin).astype(jnp.promote_types(x.dtype, jnp.float32))
        spectrum = self.analysis(x)
        z = bound.contract(params, spectrum)
        if self.has_variable(PROBE, "weight"):
            dense = bound.rebind(Dense())
            weight = self.get_variable(PROBE, "weight").reshape(dense.axes)
            z = z + dense.contract({"kernel": weight.astype(spectrum.dtype)}, spectrum)
        y = self.synthesis(z, space).astype(dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(self.bias_init, (first_axis(self.out_axes),))
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(dtype)
        return y.reshape(*batch, *space, self.features)

    def analysis(self, x: jax.Array) -> jax.Array:
        """x `(batch, *space, cin)` -> complex `(batch, *kept, cin)`."""
        return by_rows(lambda x: low_modes(x, self.modes), x)

    def synthesis(self, spectrum: jax.Array, space: Shape) -> jax.Array:
        """complex `(batch, *kept, features)` -> real `(batch, *space, features)`."""
        return by_rows(lambda z: from_low_modes(z, self.modes, space), spectrum)


def kept(modes: Sequence[int]) -> Shape:
    """Coefficients of a real signal stored along every axis: all modes, of the last axis the non-negative ones."""
    return (*modes[:-1], modes[-1] // 2 + 1)


def check_modes(modes: Sequence[int], space: Shape, shape: Shape) -> None:
    """Refuse an input of `shape` whose grid `space` is missing axes or points for the modes."""
    if not modes or len(space) != len(modes) or len(shape) <= len(modes):
        raise StructureError(
            f"modes={tuple(modes)} need {len(modes)} axes before the channels; the input is of shape {shape}"
        )
    for axis, (m, n) in enumerate(zip(modes, space)):
        if not 1 <= m <= n:
            raise StructureError(
                f"modes={tuple(modes)}: axis {axis} of an input of shape {shape} holds 1 to {n} modes, not {m}"
            )


def low_modes(x: jax.Array, modes: Sequence[int]) -> jax.Array:
    """Fourier coefficients (mean over points of x exp(-i k x)) of low frequency: real `(batch, *space, c)` -> complex
    `(batch, *kept, c)`, frequencies 0, 1, ..., -2, -1 along every axis but the last."""
    last = len(modes)
    z = jnp.fft.rfft(x, axis=last, norm="forward")
    z = jax.lax.slice_in_dim(z, 0, kept(modes)[-1], axis=last)
    for axis in range(last - 1, 0, -1):
        z = low(jnp.fft.fft(z, axis=axis, norm="forward"), modes[axis - 1], axis)
    return z


def from_low_modes(z: jax.Array, modes: Sequence[int], space: Shape) -> jax.Array:
    """The real signal `(batch, *space, c)` of coefficients `(batch, *kept, c)`, the others zero.

    Along the last axis the imaginary parts of frequency 0 and, where it is kept, of n / 2 do not count.
    """
    last = len(modes)
    for axis in range(1, last):
        z = jnp.fft.ifft(padded(z, space[axis - 1], modes[axis - 1], axis), axis=axis, norm="forward")
    return jnp.fft.irfft(z, n=space[-1], axis=last, norm="forward")


def low(z: jax.Array, modes: int, axis: int) -> jax.Array:
    """The `modes` lowest frequencies of z along `axis`, in the order of the FFT."""
    cut = lambda start, stop: jax.lax.slice_in_dim(z, start, stop, axis=axis)
    return jnp.concatenate([cut(0, (modes + 1) // 2), cut(z.shape[axis] - modes // 2, z.shape[axis])], axis)


def padded(z: jax.Array, length: int, modes: int, axis: int) -> jax.Array:
    """The inverse of `low`: zeros at the frequencies left out, `length` in all."""
    middle = (modes + 1) // 2
    zeros = jnp.zeros((*z.shape[:axis], length - modes, *z.shape[axis + 1 :]), z.dtype)
    before, after = jnp.split(z, [middle], axis)
    return jnp.concatenate([before, zeros, after], axis)
