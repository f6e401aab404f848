"""The Walsh-Hadamard transform as a fixed orthonormal matrix (Sylvester 1867)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import rows_of
from structmat.structures.errors import StructureError, nearest
from structmat.structures.leaf import Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.transform import BoundTransform, need_square

WIDEST = 6
"""log2 of the largest factor: a 64 x 64 GEMM fills a matrix unit and is at most 2x the arithmetic of two 32 x 32 ones."""


@dataclasses.dataclass(frozen=True, repr=False)
class Hadamard(Structure):
    """`hadamard()`: H[i, j] = (-1)^popcount(i & j) / sqrt(n), n a power of two; orthonormal and symmetric.

    Sylvester's (natural) order, as scipy.linalg.hadamard. Square, no parameters.
    """

    name: ClassVar[str] = "hadamard"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="hadamard()",
        formula="H = H_a ⊗ H_b ⊗ …, H₂ = [[1, 1], [1, −1]] / √2",
        params="0",
        flops="2 n (a + b + …), n = a b …",
        nearest="itself (fixed)",
        sharding="nothing stored; rows of x split, features gathered",
        paper="Sylvester 1867",
        when="spreading outliers before quantisation, random projections",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundHadamard:
        n = need_square(self, in_shape, out_shape)
        if n & (n - 1):
            below = 1 << (n.bit_length() - 1)
            raise StructureError(
                f"hadamard: needs a size that is a power of two, got {n}; nearest: {nearest(n, (below, 2 * below))}"
            )
        return BoundHadamard(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundHadamard(BoundTransform):
    """Walsh-Hadamard with sizes. No leaves.

    The product is one small GEMM per Kronecker factor rather than log2(n) passes of additions, each of which moves the
    whole input. At n = 256, 1024, 4096 and 64 or 512 rows it took 0.7 to 1.03 of the time of the passes on 2 CPU cores, with
    8 to 21 times their arithmetic, and GEMMs are what accelerators have units for.
    """

    @property
    def factors(self) -> tuple[int, ...]:
        """The fewest and most even powers of two <= 64 whose product is n."""
        bits = self.d_in.bit_length() - 1
        count = max(1, -(-bits // WIDEST))
        return tuple(2 ** (bits // count + (k < bits % count)) for k in range(count))

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        rows, y = rows_of(x), x * self.d_in**-0.5
        for size in self.factors:
            k = jnp.arange(size, dtype=jnp.int32)
            signs = _sign(k[:, None], k).astype(x.dtype)
            # Each step contracts the last digit of the index and puts it first: after all of them the order is back.
            y = (y.reshape(rows, -1, size) @ signs).swapaxes(1, 2)
        return y.reshape(x.shape)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.matmul(params, y)

    def transpose(self) -> BoundHadamard:
        """Walsh-Hadamard again: H is symmetric."""
        return dataclasses.replace(self, in_shape=self.out_shape, out_shape=self.in_shape)

    def _entries(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return _sign(i, j).astype(jnp.result_type(float)) * self.d_in**-0.5

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.d_in * sum(self.factors)


def _sign(i: jax.Array, j: jax.Array) -> jax.Array:
    return 1 - 2 * (lax.population_count(i & j) & 1)
