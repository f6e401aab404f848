"""The block-low-rank class: every (out-block, in-block) slice of W has rank <= r. Monarch and BTT are members.

In index = k*P + p over `in_blocks` blocks, out index = l*S + s (`blocked`) or s*L + l (`paper`). With T[l, k, s, p] the
entry of W between them, T[l, k] = sum_r L[l, k, r, s] R[k, p, l, r]. Two batched GEMMs multiply; one batched truncated
SVD over the slices projects, and because the slices partition the entries the result is the global optimum
(Dao et al. 2022, Theorem 1, generalised to rectangular slices of any rank).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.monarch import monarch
from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import balanced_split, diagonal_roots
from structmat.structures.recipe import Structure

Order = Literal["blocked", "paper"]


@dataclasses.dataclass(frozen=True, repr=False)
class BlockLowRank(Structure):
    """`block_low_rank(in_blocks, out_blocks, rank)`: slices of size (d_in/in_blocks, d_out/out_blocks), output blocked."""

    in_blocks: int | None = None
    out_blocks: int | None = None
    rank: int | None = None
    name: ClassVar[str] = "block_low_rank"
    about: ClassVar[About] = About(
        example="block_low_rank(in_blocks=8, out_blocks=8, rank=2)",
        formula="k × l slices T[l,k] of rank r",
        params="r (l n + k m)",
        flops="2 × parameters",
        nearest="optimal (SVD per slice), diagonal grams",
        sharding="over k or l; none column-parallel, one all-reduce row-parallel",
        paper="Qiu et al. 2024; Dao et al. 2022",
        when="the common class of Monarch and block tensor train",
        kernel="monarch",
    )

    def check(self) -> None:
        self.need(in_blocks=1, out_blocks=1, rank=1)

    def _blocks(self, in_shape: Shape, out_shape: Shape) -> None:
        self.required("in_blocks", "out_blocks")
        self.choose("in_blocks", divisors(math.prod(in_shape)), in_shape, out_shape)
        self.choose("out_blocks", divisors(math.prod(out_shape)), in_shape, out_shape)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlockLowRank:
        self._blocks(in_shape, out_shape)
        self.required("rank")
        full = min(math.prod(in_shape) // self.in_blocks, math.prod(out_shape) // self.out_blocks)
        self.choose("rank", range(1, full + 1), in_shape, out_shape)
        return BoundBlockLowRank(self, in_shape, out_shape, self.in_blocks, self.out_blocks, self.rank, "blocked")

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        self._blocks(in_shape, out_shape)
        full = min(math.prod(in_shape) // self.in_blocks, math.prod(out_shape) // self.out_blocks)
        return [dataclasses.replace(self, rank=r) for r in range(1, full + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlockLowRank(Bound):
    """Block low rank with sizes: leaves `R` (k, p, l, r) and `L` (l, k, r, s), both contraction-major."""

    grams: ClassVar[str] = "diagonal"
    in_blocks: int
    out_blocks: int
    rank: int
    order: Order

    last: ClassVar[str] = "L"

    @property
    def splits(self) -> tuple[str, ...]:
        """Output blocks are runs of columns in `blocked` order only."""
        return ("in", "out") if self.order == "blocked" else ("in",)

    def __repr__(self) -> str:
        k, p, l, s, r = self.sizes
        return f"{super().__repr__()}, {k} x {l} slices of {p} x {s}, rank {r}"

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(k, p, l, s, r)."""
        k, l = self.in_blocks, self.out_blocks
        return k, self.d_in // k, l, self.d_out // l, self.rank

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        k, p, l, s, r = self.sizes
        i, o = first_axis(in_axes), first_axis(out_axes)
        return {
            "R": self.factor((k, p, l, r), (i, "block_in", o, "rank"), p, l * r, share=2),
            "L": self.factor((l, k, r, s), (o, i, "rank", "block_out"), k * r, s, share=2, embed_fan=r),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        right, left = params["R"], params["L"]
        y = monarch(x, right, left)
        if self.order == "blocked":
            return y
        l, s = left.shape[0], left.shape[3]
        return y.reshape(*x.shape[:-1], l, s).swapaxes(-1, -2).reshape(y.shape)

    def materialize(self, params: Params) -> jax.Array:
        out = "ls" if self.order == "blocked" else "sl"
        return jnp.einsum(f"kplr,lkrs->kp{out}", params["R"], params["L"]).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        _, p, l, _, r = self.sizes
        right = params["R"].reshape(self.d_in, l, r)[ids]
        left = params["L"].transpose(1, 0, 2, 3)[ids // p]
        out = "ls" if self.order == "blocked" else "sl"
        return jnp.einsum(f"...lr,...lrs->...{out}", right, left).reshape(*ids.shape, self.d_out)

    def slices(self, w: jax.Array) -> jax.Array:
        """The dense matrix as (k, l, p, s): one slice per block pair."""
        k, p, l, s, _ = self.sizes
        if self.order == "blocked":
            return w.reshape(k, p, l, s).transpose(0, 2, 1, 3)
        return w.reshape(k, p, s, l).transpose(0, 3, 1, 2)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: truncated SVD of every slice, error^2 = sum of the discarded sigma^2 over slices.

        A diagonal gram keeps the problem slice-wise and is solved exactly; a full gram couples slices and is refused.
        """
        self.check_dense(w)
        k, p, _, _, r = self.sizes
        t = self.slices(w)
        left = right = None
        if in_gram is not None:
            root, left = diagonal_roots(in_gram, self.d_in, "in_gram", self.structure.name)
            t = t * root.reshape(k, 1, p, 1)
        if out_gram is not None:
            root, right = diagonal_roots(out_gram, self.d_out, "out_gram", self.structure.name)
            t = t * self._out_blocks(root)[None, :, None, :]
        a, b = balanced_split(t, r)
        if left is not None:
            a = a * left.reshape(k, 1, p, 1)
        if right is not None:
            b = b * self._out_blocks(right)[None, :, None, :]
        return {"R": a.transpose(0, 2, 1, 3).astype(w.dtype), "L": b.transpose(1, 0, 2, 3).astype(w.dtype)}

    def _out_blocks(self, v: jax.Array) -> jax.Array:
        _, _, l, s, _ = self.sizes
        return v.reshape(l, s) if self.order == "blocked" else v.reshape(s, l).T

    def _flops(self, rows: int) -> int:
        k, p, l, s, r = self.sizes
        return 2 * rows * k * l * r * (p + s)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.d_out * self.rank
