"""N:M sparsity: of every M consecutive entries along one axis, N are kept (Zhou et al. 2021, arXiv 2102.04010)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, scale_columns, scale_rows
from structmat.structures.random_sparse import draw_rows
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class NMSparse(Structure):
    """`n_m_sparse(n, m, axis='in')`: groups along the contraction axis (what sparse tensor cores read), or along `out`.

    The support is kept in the structure: drawn at random by init, chosen by magnitude by `project`. For a support that
    follows the weights while they train, use masked(dense(), n_m_sparse(n, m)).
    """

    n: int | None = None
    m: int | None = None
    axis: Literal["in", "out"] = "in"
    name: ClassVar[str] = "n_m_sparse"
    about: ClassVar[About] = About(
        example="n_m_sparse(n=2, m=4)",
        formula="N of every M consecutive entries",
        params="n m N/M, and as many int32",
        flops="2 n m N/M, executed dense",
        nearest="optimal (magnitude), diagonal grams",
        sharding="whole groups over both axes",
        paper="Zhou et al. 2021",
        when="what sparse tensor cores read",
    )

    def check(self) -> None:
        self.need(n=1, m=1)
        if self.n is not None and self.m is not None and self.n > self.m:
            raise StructureError(f"n_m_sparse: n must be at most m={self.m}, got {self.n}")

    def _check_group(self, in_shape: Shape, out_shape: Shape) -> None:
        self.required("m")
        size = math.prod(in_shape if self.axis == "in" else out_shape)
        self.choose("m", divisors(size), in_shape, out_shape)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundNMSparse:
        self._check_group(in_shape, out_shape)
        self.required("n")
        return BoundNMSparse(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.n is not None:
            return []
        self._check_group(in_shape, out_shape)
        return [dataclasses.replace(self, n=n) for n in range(1, self.m + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundNMSparse(Bound):
    """N:M with sizes. Leaves `values` (lines, groups, n) and the frozen int32 `positions` in 0..m-1, ascending.

    A line is a column of W for axis='in' and a row for axis='out'; the groups follow the other index.

    Without sparse hardware gathers lose to a GEMM at these densities, so every product rebuilds the dense matrix (one
    comparison per entry, rebuilt in the backward pass rather than kept) and `cost().flops_executed` is the dense count.
    """

    grams: ClassVar[str] = "diagonal"
    last: ClassVar[str] = "values"

    @property
    def _inward(self) -> bool:
        return self.structure.axis == "in"

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(lines, groups, m)."""
        lines, size = (self.d_out, self.d_in) if self._inward else (self.d_in, self.d_out)
        return lines, size // self.structure.m, self.structure.m

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        n, m = self.structure.n, self.structure.m
        lines, groups, _ = self._shape
        axes = (first_axis(out_axes), first_axis(in_axes), None)
        axes = axes if self._inward else (axes[1], axes[0], None)
        kept = lambda d: max(1, round(d * n / m))
        index = Leaf((lines, groups, n), axes, 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False)
        return {
            "values": self.factor((lines, groups, n), axes, kept(self.d_in), kept(self.d_out), share=1),
            "positions": index,
        }

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if name == "positions":
            lines, groups, m = self._shape
            return draw_rows(key, lines * groups, m, self.structure.n).reshape(leaf.shape)
        return super()._sample(name, leaf, key, dtype)

    def materialize(self, params: Params) -> jax.Array:
        values, positions = params["values"], params["positions"]
        here = positions[..., None] == jnp.arange(self.structure.m)
        dense = jnp.sum(jnp.where(here, values[..., None], 0), axis=-2).astype(values.dtype)
        return self._from_lines(dense)

    def _from_lines(self, groups: jax.Array) -> jax.Array:
        flat = groups.reshape(groups.shape[0], -1)
        return flat.T if self._inward else flat

    def _to_lines(self, w: jax.Array) -> jax.Array:
        """(lines, groups, m) of a matrix."""
        return (w.T if self._inward else w).reshape(self._shape)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda p, x: x @ self.materialize(p))(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda p, y: y @ self.materialize(p).T)(params, y)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the n largest |w| of each group, weighted by the roots of diagonal grams.

        Ties go to the lower index. A full gram makes the choice combinatorial and is refused.
        """
        self.check_dense(w)
        roots = [
            None if gram is None else diagonal_roots(gram, size, what, self.structure.name)[0]
            for gram, size, what in ((in_gram, self.d_in, "in_gram"), (out_gram, self.d_out, "out_gram"))
        ]
        keep = self._keep(self._to_lines(scale_columns(scale_rows(roots[0], jnp.abs(w)), roots[1])))
        positions = jnp.argsort(~keep, axis=-1, stable=True)[..., : self.structure.n].astype(jnp.int32)
        return {"values": jnp.take_along_axis(self._to_lines(w), positions, axis=-1), "positions": positions}

    def _keep(self, score: jax.Array) -> jax.Array:
        """Exactly n of each group `(..., m)`, by pairwise ranks: unlike top_k they need no collective when sharded."""
        earlier = jnp.arange(score.shape[-1])
        mine, other = score[..., :, None], score[..., None, :]
        beaten = (other > mine) | ((other == mine) & (earlier[None, :] < earlier[:, None]))
        return jnp.sum(beaten, axis=-1) < self.structure.n

    def mask_leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """What `masked` stores beside the weights: nothing, the mask follows them."""
        return {}

    def mask(self, w: jax.Array, stored: Params) -> jax.Array:
        """Boolean (d_in, d_out): exactly the n largest entries of each group of w."""
        return self._from_lines(self._keep(self._to_lines(jnp.abs(w))))

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """As for every structure, but both paths execute the dense product."""
        executed = 2 * rows * self.d_in * self.d_out
        return dataclasses.replace(super().cost(rows, dtype, path), flops_executed=executed)

    def _flops(self, rows: int) -> int:
        lines, groups, _ = self._shape
        return 2 * rows * lines * groups * self.structure.n

    def _materialize_flops(self) -> int:
        return 0
