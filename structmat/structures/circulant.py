"""Circulant matrices: one number per wrapped diagonal, multiplied by FFT (Davis 1979; Cheng et al. 2015)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.fft import convolve, convolve_flops, fast_length
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.toeplitz import diagonal_sums, shared_mean
from structmat.structures.transform import need_square


@dataclasses.dataclass(frozen=True, repr=False)
class Circulant(Structure):
    """`circulant()`: W[i, j] = c[(j - i) mod n], square; n parameters.

    Row 0 of W is c, and x @ W the circular convolution of x and c (scipy.linalg.circulant(c) is W^T). Members commute and
    are closed under products. `paper` init is uniform +-1/sqrt(n).
    """

    name: ClassVar[str] = "circulant"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="circulant()",
        formula="W[i,j] = c[(j − i) mod n]",
        params="n",
        flops="5 n log₂ n + n/2 (n of factors 2, 3, 5)",
        nearest="optimal (mean of each wrapped diagonal)",
        sharding="c replicated; rows of x split, features gathered",
        paper="Davis 1979; Cheng et al. 2015",
        when="n parameters and no more; periodic signals",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundCirculant:
        need_square(self, in_shape, out_shape)
        return BoundCirculant(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundCirculant(Bound):
    """Circulant with sizes. Leaf `c` (n,), declared like a dense factor of fan_in and fan_out n, as `toeplitz` is.

    The product is by FFT, in f32 for bf16 and f16 inputs and cast back: of length n if n has no prime factor above 5, else
    of the Toeplitz matrix of the same entries, whose length is free (at n = 4099 an FFT of length n took minutes to compile
    for a TPU).
    """

    last: ClassVar[str] = "c"
    grams: ClassVar[str] = "diagonal"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        return {"c": self.factor((self.d_in,), (None,), self.d_in, self.d_out, share=1)}

    @property
    def _length(self) -> int:
        n = self.d_in
        return n if fast_length(n) == n else fast_length(2 * n - 1)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        c, n = params["c"], self.d_in
        if self._length == n:
            y = convolve(x, c, n)
        else:
            y = convolve(x, jnp.concatenate([c[1:], c]), self._length)[..., n - 1 : 2 * n - 1]
        return y.astype(jnp.result_type(x, c))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.matmul({"c": jnp.roll(params["c"][::-1], 1)}, y)

    def materialize(self, params: Params) -> jax.Array:
        return self.take(params, jnp.arange(self.d_in))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return params["c"][(jnp.arange(self.d_out) - ids[..., None]) % self.d_in]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the mean of each wrapped diagonal, weighted by a_i b_j under diagonal grams a, b.

        Diagonals without weight become zero. A full gram couples the diagonals and is refused.
        """
        return {"c": shared_mean(self, w, _wrapped_sums, in_gram, out_gram)}

    def _flops(self, rows: int) -> int:
        return convolve_flops(rows, self._length)

    def _materialize_flops(self) -> int:
        return 0


def _wrapped_sums(w: jax.Array) -> jax.Array:
    """Sums over (j - i) mod n = k of w `(n, n)`: the diagonals k and k - n."""
    n = w.shape[0]
    sums = diagonal_sums(w)
    return sums[n - 1 :].at[1:].add(sums[: n - 1])
