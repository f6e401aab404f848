"""Toeplitz matrices: one number per diagonal, multiplied by FFT (Golub and Van Loan 2013, section 4.8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.fft import convolve, convolve_flops, fast_length
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.linalg import diagonal_roots, working_dtype
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Toeplitz(Structure):
    """`toeplitz()`: W[i, j] = t[j - i + d_in - 1], of any shape; d_in + d_out - 1 parameters.

    The first column of W is t[d_in-1], ..., t[0], its first row t[d_in-1], ..., t[-1]. `paper` init is uniform
    +-1/sqrt(d_in).
    """

    name: ClassVar[str] = "toeplitz"
    about: ClassVar[About] = About(
        example="toeplitz()",
        formula="W[i,j] = t[j − i + n − 1]",
        params="n + m − 1",
        flops="5 L log₂ L + L/2, L ≥ n + m − 1",
        nearest="optimal (mean of each diagonal)",
        sharding="t replicated; rows of x split, features gathered",
        paper="Golub and Van Loan 2013, 4.8",
        when="translation-invariant mixing (sequences, signals)",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundToeplitz:
        return BoundToeplitz(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundToeplitz(Bound):
    """Toeplitz with sizes. Leaf `t` (d_in + d_out - 1,).

    Each output sums d_in different entries of t, so t is declared like a dense factor, with fan_in d_in: E[y^2] and
    learning rates are those of a dense matrix. That one entry serves up to min(d_in, d_out) outputs averages its gradient
    but does not enter the fans.

    The product is always the FFT one, in f32 for bf16 and f16 inputs and cast back; where a GEMM is faster (on 2 CPU cores
    below about 512 x 512) nn's `path` materialises.
    """

    last: ClassVar[str] = "t"
    grams: ClassVar[str] = "diagonal"

    @property
    def _length(self) -> int:
        """Of the FFT: wrapped entries of the convolution fall on outputs that are not read."""
        return fast_length(self.d_in + self.d_out - 1)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        return {"t": self.factor((self.d_in + self.d_out - 1,), (None,), self.d_in, self.d_out, share=1)}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        y = convolve(x, params["t"], self._length)[..., self.d_in - 1 : self.d_in - 1 + self.d_out]
        return y.astype(jnp.result_type(x, params["t"]))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        x = convolve(y, params["t"][::-1], self._length)[..., self.d_out - 1 : self.d_out - 1 + self.d_in]
        return x.astype(jnp.result_type(y, params["t"]))

    def materialize(self, params: Params) -> jax.Array:
        return self.take(params, jnp.arange(self.d_in))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return params["t"][jnp.arange(self.d_out) - ids[..., None] + (self.d_in - 1)]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the mean of each diagonal, weighted by a_i b_j under diagonal grams a, b.

        Diagonals without weight become zero. A full gram couples the diagonals and is refused.
        """
        return {"t": shared_mean(self, w, diagonal_sums, in_gram, out_gram)}

    def _flops(self, rows: int) -> int:
        return convolve_flops(rows, self._length)

    def _materialize_flops(self) -> int:
        return 0


def diagonal_sums(w: jax.Array) -> jax.Array:
    """Sums over the diagonals of w `(p, q)`: entry k is that of j - i + p - 1 = k, `(p + q - 1,)`.

    With the rows reversed and padded to p + q columns, reading the array as one of p + q - 1 columns moves each row one
    further to the right, so that diagonals become columns: no scatter.
    """
    p, q = w.shape
    padded = jnp.pad(w[::-1], ((0, 0), (0, p)))
    return jnp.sum(padded.reshape(-1)[: p * (p + q - 1)].reshape(p, p + q - 1), axis=0)


def shared_mean(
    bound: Bound,
    w: jax.Array,
    sums: Callable[[jax.Array], jax.Array],
    in_gram: jax.Array | None,
    out_gram: jax.Array | None,
) -> jax.Array:
    """Nearest values to w `(d_in, d_out)` of a matrix whose entries are shared: the weighted mean over each group.

    Args:
      sums: matrix -> sum over each group of entries.
      in_gram, out_gram: None or the vectors a, b of the weights a_i b_j. A group without weight becomes zero.

    Raises:
      StructureError: wrong shapes, or a full gram.
    """
    bound.check_dense(w)
    sides = []
    for gram, size, what in ((in_gram, bound.d_in, "in_gram"), (out_gram, bound.d_out, "out_gram")):
        if gram is not None:
            diagonal_roots(gram, size, what, bound.structure.name)
        sides.append((jnp.ones(size) if gram is None else gram).astype(jnp.finfo(working_dtype(w)).dtype))
    weights = sides[0][:, None] * sides[1]
    total = sums(weights)
    return jnp.where(total > 0, sums(weights * w) / jnp.where(total > 0, total, 1), 0).astype(w.dtype)
