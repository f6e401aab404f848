"""Low rank: W = A^T B with A (r, in) and B (r, out)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.low_rank import low_rank
from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import weighted_split
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(Structure):
    """`low_rank(rank)`: two factors of inner size `rank`; parameters rank (d_in + d_out).

    `paper` init is that of LoRA and SLTrain: A uniform +-1/sqrt(d_in), B zero.
    """

    rank: int | None = None
    name: ClassVar[str] = "low_rank"
    about: ClassVar[About] = About(
        example="low_rank(rank=8)",
        formula="A B, A (n, r), B (r, m)",
        params="r (n + m)",
        flops="2 r (n + m)",
        nearest="optimal (SVD), any gram",
        sharding="A over n, B over m; all-reduce over r only",
        paper="Eckart and Young 1936",
        when="adapters, smooth spectra; fastest per FLOP",
        kernel="low_rank",
    )

    def check(self) -> None:
        self.need(rank=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundLowRank:
        self.required("rank")
        self.choose("rank", range(1, _full(in_shape, out_shape) + 1), in_shape, out_shape)
        return BoundLowRank(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        return [dataclasses.replace(self, rank=r) for r in range(1, _full(in_shape, out_shape) + 1)]


def _full(in_shape: Shape, out_shape: Shape) -> int:
    return min(math.prod(in_shape), math.prod(out_shape))


@dataclasses.dataclass(frozen=True, repr=False)
class BoundLowRank(Bound):
    """Low rank with sizes. Leaves `a` (r, d_in), `b` (r, d_out), the layout narrow factors want on TPU."""

    grams: ClassVar[str] = "full"
    splits: ClassVar[tuple[str, ...]] = ("in", "out")
    last: ClassVar[str] = "b"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        r = self.structure.rank
        zero = {"std": 0.0} if self.structure.init == "paper" else {}
        return {
            "a": self.factor((r, self.d_in), ("rank", first_axis(in_axes)), self.d_in, r, share=2),
            "b": self.factor(
                (r, self.d_out), ("rank", first_axis(out_axes)), r, self.d_out, share=2, embed_fan=r, **zero
            ),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return low_rank(x, params["a"], params["b"])

    def materialize(self, params: Params) -> jax.Array:
        return params["a"].T @ params["b"]

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return (y @ params["b"].T) @ params["a"]

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.take(params["a"].T, ids, axis=0) @ params["b"]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum (Eckart-Young); with grams the optimum of the whitened problem, error^2 = sum of its
        discarded squared singular values."""
        self.check_dense(w)
        a, b = weighted_split(w, self.structure.rank, in_gram, out_gram)
        return {"a": a.T.astype(w.dtype), "b": b.astype(w.dtype)}

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.structure.rank * (self.d_in + self.d_out)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.structure.rank * self.d_out
