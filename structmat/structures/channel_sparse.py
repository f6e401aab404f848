"""Channel sparse: a few whole rows or columns of the matrix, one small dense GEMM (the sparse part of LOST).

Li et al. 2025, "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668: the input channels
whose rows in the residual of a truncated SVD have the largest norms keep a dense row each beside the low-rank term.
`low_rank(rank) + channel_sparse(density, select='norm')`, projected, does this and goes on alternating.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, gram_roots, scale_columns, scale_rows, working_dtype
from structmat.structures.random_sparse import draw_rows
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class ChannelSparse(Structure):
    """`channel_sparse(density, axis='in', select='random')`: k = round(density size) channels, the rest of W is zero.

    axis='in' keeps input channels, rows of W: y = x[..., index] @ values. axis='out' keeps output channels, columns of
    W: y[..., index] = x @ values, zero elsewhere. `select` is how `project` chooses them: `random` draws from its key
    (or keeps those of `like`), `norm` takes the largest L2 norms. Initialisation draws them at random in both cases.
    """

    density: float | None = None
    axis: Literal["in", "out"] = "in"
    select: Literal["random", "norm"] = "random"
    name: ClassVar[str] = "channel_sparse"
    about: ClassVar[About] = About(
        example="channel_sparse(density=0.125)",
        formula="d n whole rows (axis='in') or d m whole columns (axis='out')",
        params="d n m, and d n or d m int32 indices",
        flops="2 d n m",
        nearest="optimal on its channels, select='norm' of all; diagonal grams, full on the side that is not selected",
        sharding="axis='in' over m, axis='out' over n; row-parallel reduces the kept entries alone",
        paper="Li et al. 2025 (LOST)",
        when="outlier channels beside a low-rank term",
    )

    def check(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise StructureError(f"channel_sparse: density must be in (0, 1], got {self.density}")

    def _size(self, in_shape: Shape, out_shape: Shape) -> int:
        return math.prod(in_shape if self.axis == "in" else out_shape)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundChannelSparse:
        self.required("density")
        size = self._size(in_shape, out_shape)
        if round(self.density * size) < 1:
            raise StructureError(
                f"channel_sparse: density={self.density} leaves none of {size} channels; "
                f"smallest density is {1 / size:.6g}"
            )
        return BoundChannelSparse(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.density is not None:
            return []
        size = self._size(in_shape, out_shape)
        return [dataclasses.replace(self, density=k / size) for k in range(1, size + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundChannelSparse(Bound):
    """Channel sparse with sizes: leaves `values`, (k, d_out) or (d_in, k), and the frozen int32 `index` (k,), ascending.

    Only the whole side of `values` names a logical axis; the channels may lie on any device. A product sends nothing
    where the output is split over devices (column-parallel) and reduces the k kept entries per row where the input is
    (row-parallel). Devices share the GEMM with axis='in' column-parallel and axis='out' row-parallel, which are the
    placements to choose; in the other two each repeats it.

    At init a kept output has the size of a dense layer with `values` as its weight; with axis='out' the others are zero.
    """

    grams: ClassVar[str] = "diagonal"
    last: ClassVar[str] = "values"

    @property
    def exact(self) -> bool:
        """With `norm` the optimum of the class, with `random` only for the channels."""
        return self.structure.select == "norm"

    @property
    def _inward(self) -> bool:
        return self.structure.axis == "in"

    @property
    def size(self) -> int:
        """Channels to choose from."""
        return self.d_in if self._inward else self.d_out

    @property
    def count(self) -> int:
        """Channels kept."""
        return round(self.structure.density * self.size)

    def _index_leaf(self) -> Leaf:
        return Leaf((self.count,), (None,), 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        shape = (self.count, self.d_out) if self._inward else (self.d_in, self.count)
        axes = (None, first_axis(out_axes)) if self._inward else (first_axis(in_axes), None)
        return {"values": self.factor(shape, axes, *shape, share=1), "index": self._index_leaf()}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        return self._draw(key) if name == "index" else super()._sample(name, leaf, key, dtype)

    def _draw(self, key: jax.Array) -> jax.Array:
        return draw_rows(key, 1, self.size, self.count)[0]

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        if self._inward:
            return _gather(x, params["index"]) @ params["values"]
        return _scatter(x @ params["values"], params["index"], self.d_out)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        if self._inward:
            return _scatter(y @ params["values"].T, params["index"], self.d_in)
        return _gather(y, params["index"]) @ params["values"].T

    def materialize(self, params: Params) -> jax.Array:
        values, index = params["values"], params["index"]
        return _scatter(values.T, index, self.d_in).T if self._inward else _scatter(values, index, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        values, index = params["values"], params["index"]
        if not self._inward:
            return _scatter(values[ids], index, self.d_out)
        slot = jnp.full(self.d_in, self.count).at[index].set(jnp.arange(self.count))[ids]
        return jnp.where((slot < self.count)[..., None], values[jnp.minimum(slot, self.count - 1)], 0)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The channels of w on the support: optimal for it. With `norm` the support is the best one too.

        Channels are chosen by largest norm, ties to the lower index. The gram of the selected side must be diagonal;
        that of the other may be full: the weighted norm of channel i is a_i w_i B w_i^T.

        Raises:
          StructureError: a full gram of the selected side, or `random` without `key` and `like`.
        """
        self.check_dense(w)
        lines, grams = (w, (in_gram, out_gram)) if self._inward else (w.T, (out_gram, in_gram))
        power = self._power(lines, *grams)
        if self.structure.select == "norm":
            index = self._largest(power)
        elif like is not None:
            index = like["index"]
        elif key is not None:
            index = self._draw(key)
        else:
            raise StructureError(
                "channel_sparse: select='random' draws its channels, so project needs key=jax.random.key(...) or "
                "like=...; select='norm' takes the largest"
            )
        return {"values": lines[index] if self._inward else lines[index].T, "index": index}

    def _power(self, lines: jax.Array, own: jax.Array | None, other: jax.Array | None) -> jax.Array:
        """Squared weighted norm of each of `lines` (size, other size)."""
        names = ("in_gram", "out_gram") if self._inward else ("out_gram", "in_gram")
        root = None if own is None else diagonal_roots(own, lines.shape[0], names[0], self.structure.name)[0]
        across = None if other is None else gram_roots(other, lines.shape[1], names[1])[0]
        return jnp.sum(
            jnp.abs(scale_columns(scale_rows(root, lines.astype(working_dtype(lines))), across)) ** 2, axis=1
        )

    def _largest(self, power: jax.Array) -> jax.Array:
        return jnp.sort(lax.top_k(power, self.count)[1]).astype(jnp.int32)

    def mask_leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """What `masked` stores beside the weights: the channels when they are random, else nothing."""
        return {"index": self._index_leaf()} if self.structure.select == "random" else {}

    def mask(self, w: jax.Array, stored: Params) -> jax.Array:
        """Boolean (d_in, d_out): the stored channels, or those of w with the largest norms."""
        index = (
            stored["index"] if "index" in stored else self._largest(self._power(w if self._inward else w.T, None, None))
        )
        kept = jnp.zeros(self.size, bool).at[index].set(True)
        return jnp.broadcast_to(kept[:, None] if self._inward else kept, (self.d_in, self.d_out))

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.count * (self.d_out if self._inward else self.d_in)

    def _materialize_flops(self) -> int:
        return 0


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """x `(..., size)` -> `(..., k)`."""
    return x.at[..., index].get(unique_indices=True, indices_are_sorted=True)


@functools.partial(jax.checkpoint, static_argnums=2)
def _scatter(z: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """z `(..., k)` -> `(..., size)`, zero elsewhere; rematerialised, or the backward pass would keep the zeros."""
    empty = jnp.zeros((*z.shape[:-1], size), z.dtype)
    return empty.at[..., index].add(z, unique_indices=True, indices_are_sorted=True)
