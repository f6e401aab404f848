"""Ordered low rank: W = A^T B of which only the first `width` components act, for a method that finds the width.

Horvath et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv 2308.14929.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.low_rank import low_rank
from structmat.structures.base import Bound
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import balanced_split, weighted_split, working_dtype
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Ordered(Structure):
    """`ordered(rank=None)`: low rank with components in order, min(d_in, d_out) of them when None; all of them are stored
    and the first `width` act.

    Starts as the best approximation of the dense matrix that `init` draws, which at full rank is that matrix, in factors
    that share its singular values evenly. Parameters and FLOPs are those of `rank`: nothing is saved before
    `structmat.surgery.sliced` takes the components that do not act away.
    """

    rank: int | None = None
    name: ClassVar[str] = "ordered"

    def check(self) -> None:
        self.need(rank=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundOrdered:
        full = min(math.prod(in_shape), math.prod(out_shape))
        if self.rank is None:
            return BoundOrdered(dataclasses.replace(self, rank=full), in_shape, out_shape)
        self.choose("rank", range(1, full + 1), in_shape, out_shape)
        return BoundOrdered(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        full = min(math.prod(in_shape), math.prod(out_shape))
        return [dataclasses.replace(self, rank=r) for r in range(1, full + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundOrdered(Bound):
    """Ordered with sizes. Leaves `a` (r, d_in), `b` (r, d_out) and the frozen int32 `width` (), from 1 to r."""

    grams: ClassVar[str] = "full"
    splits: ClassVar[tuple[str, ...]] = ("in", "out")
    last: ClassVar[str] = "b"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        r, n, m = self.structure.rank, self.d_in, self.d_out
        dense = self.factor((n, m), (None, None), n, m, share=1)
        typical = dense.std * math.sqrt(max(n, m))  # RMS of its singular values
        law = {"law": "derived"}
        return {
            "a": self.factor((r, n), ("rank", first_axis(in_axes)), n, r, 2, std=math.sqrt(typical / n), **law),
            "b": self.factor(
                (r, m), ("rank", first_axis(out_axes)), r, m, 2, embed_fan=r, std=math.sqrt(typical / m), **law
            ),
            "width": Leaf((), (), 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False),
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        """The factors of one dense draw; a gain acts on `b`."""
        shape = (self.d_in, self.d_out)
        dense = self.factor(shape, (None, None), *shape, share=1)
        w = self._sample("dense", dense, key, working_dtype(jnp.zeros((), dtype)))
        a, b = balanced_split(w, self.structure.rank)
        return self._whole(a.T.astype(dtype), (gain * b).astype(dtype))

    def _whole(self, a: jax.Array, b: jax.Array) -> dict[str, Any]:
        return {"a": a, "b": b, "width": jnp.full((), self.structure.rank, jnp.int32)}

    def _acting(self, params: Params) -> jax.Array:
        """`a` with zeros past the width: less to mask than the activations, and no gradient passes there either."""
        return jnp.where(acting(params["width"], self.structure.rank)[:, None], params["a"], 0)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return low_rank(x, self._acting(params), params["b"])

    def materialize(self, params: Params) -> jax.Array:
        return self._acting(params).T @ params["b"]

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return (y @ params["b"].T) @ self._acting(params)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.take(self._acting(params).T, ids, axis=0) @ params["b"]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum, as of low_rank, with all components acting; without grams the first k are the best of rank k."""
        self.check_dense(w)
        a, b = weighted_split(w, self.structure.rank, in_gram, out_gram)
        return self._whole(a.T.astype(w.dtype), b.astype(w.dtype))

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.structure.rank * (self.d_in + self.d_out)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.structure.rank * self.d_out

    def params_at(self, width: int) -> int:
        """Numbers to store for this width: those of two factors, or of the dense matrix where it has no more."""
        return min(width * (self.d_in + self.d_out), self.d_in * self.d_out)


def acting(width: jax.Array, rank: int) -> jax.Array:
    """bool (..., rank): which components act, for widths (...)."""
    return jnp.arange(rank) < width[..., None]


def tail_norms(factor: jax.Array) -> jax.Array:
    """|factor[i:]| in Frobenius norm for every i: (..., r, d) -> f32 (..., r). The gradient of a zero tail is zero."""
    squares = jnp.sum(jnp.square(factor.astype(jnp.float32)), axis=-1)
    tails = jax.lax.cumsum(squares, axis=squares.ndim - 1, reverse=True)
    return jnp.where(tails > 0, jnp.sqrt(jnp.where(tails > 0, tails, 1)), 0)


def importance(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a[i:]| |b[i:]| of every component i, never increasing: (..., r, d_in), (..., r, d_out) -> f32 (..., r)."""
    products = tail_norms(a) * tail_norms(b)
    return jax.lax.cummax(products, axis=products.ndim - 1, reverse=True)  # sums round in any order
