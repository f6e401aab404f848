"""The discrete Fourier transform as a fixed unitary matrix (Cooley and Tukey 1965)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.fft import by_rows, fft_flops
from structmat.structures.leaf import Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.transform import BoundTransform, cosine, multiply_mod, need_square


@dataclasses.dataclass(frozen=True, repr=False)
class Fourier(Structure):
    """`fourier(inverse=False)`: F[j, k] = exp(-2 pi i j k / n) / sqrt(n), unitary and symmetric; the inverse conjugates.

    Square, no parameters, complex output of real or complex input: complex64, or complex128 of f64 input. A bf16 or f16
    input is transformed in f32 and gives complex64. Sizes with large prime factors are slow to compile for TPUs.
    """

    inverse: bool = False
    name: ClassVar[str] = "fourier"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="fourier()",
        formula="F[j,k] = exp(−2πi jk/n) / √n",
        params="0",
        flops="5 n log₂ n",
        nearest="itself (fixed)",
        sharding="nothing stored; rows of x split, features gathered",
        paper="Cooley and Tukey 1965",
        when="mixing at no parameters; diagonalises circulants",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundFourier:
        need_square(self, in_shape, out_shape)
        return BoundFourier(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundFourier(BoundTransform):
    """The DFT with sizes. No leaves."""

    is_complex: ClassVar[bool] = True

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        transform = jnp.fft.ifft if self.structure.inverse else jnp.fft.fft
        return by_rows(lambda x: transform(x, norm="ortho"), x.astype(jnp.promote_types(x.dtype, jnp.complex64)))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.matmul(params, y)

    def transpose(self) -> BoundFourier:
        """The DFT again: F is symmetric."""
        return dataclasses.replace(self, in_shape=self.out_shape, out_shape=self.in_shape)

    def _entries(self, i: jax.Array, j: jax.Array) -> jax.Array:
        n = self.d_in
        turn = 4 * multiply_mod(i, j, n)
        ahead = jnp.where(turn >= 3 * n, turn - 3 * n, turn + n)
        real, minus_sine = cosine(turn, 4 * n), cosine(ahead, 4 * n)
        return lax.complex(real, -minus_sine if self.structure.inverse else minus_sine) * n**-0.5

    def _flops(self, rows: int) -> int:
        return fft_flops(rows, self.d_in)
