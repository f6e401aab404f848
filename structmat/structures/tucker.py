"""Tucker: a small core tensor with one factor per axis (Tucker 1966; De Lathauwer et al. 2000)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.descent import keep_better
from structmat.structures.errors import StructureError
from structmat.structures.factors import side_axes, side_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.tucker_format import (
    TuckerFormat,
    cheapest_order,
    proportional_ranks,
    reduction_flops,
    useful_ranks,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Tucker(Structure):
    """`tucker(rank, modes=2)`: the weight's axes as the axes of a Tucker tensor.

    A side of several axes keeps them; a plain side is split into its `modes` most even factors (modes=1: not at all).
    The axes of input and output together carry the ranks. An int rank is min(rank, size of the axis, product of the
    others) on each, as TuckerFormat.of says; a tuple gives one rank per axis. `fit` raises all ranks in proportion to
    their axes.
    """

    rank: int | tuple[int, ...] | None = None
    modes: int = 2
    name: ClassVar[str] = "tucker"
    about: ClassVar[About] = About(
        example="tucker(rank=6)",
        formula="G ×₁ U₁ ... ×_N U_N over the factors of n and m",
        params="Π r_k + Σ n_k r_k",
        flops="2 (n r + m r + ... + Π r_k)",
        nearest="heuristic: HOSVD, then HOOI, monotone (optimal for modes=1)",
        sharding="first factor of each side; all-reduce over its rank",
        paper="De Lathauwer et al. 2000; Si et al. 2024 (FLoRA)",
        when="weights with several meaningful axes: convolutions, spectral weights, heads",
    )

    def check(self) -> None:
        self.need(modes=1)
        for rank in self.rank if isinstance(self.rank, tuple) else (self.rank,):
            if rank is not None and rank < 1:
                raise StructureError(f"tucker: rank must be at least 1, got {self.rank}")

    def _axes(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, Shape]:
        split = lambda shape, what: side_factors(shape, self.modes, self.name, what)
        return split(in_shape, "d_in"), split(out_shape, "d_out")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundTucker:
        self.required("rank")
        ins, outs = self._axes(in_shape, out_shape)
        if isinstance(self.rank, int):
            most = max(useful_ranks(ins + outs, ins + outs))
            self.choose("rank", range(1, most + 1), in_shape, out_shape)
        return BoundTucker(self, in_shape, out_shape, TuckerFormat.of(ins + outs, self.rank), len(ins))

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        ins, outs = self._axes(in_shape, out_shape)
        return [dataclasses.replace(self, rank=_short(ins + outs, r)) for r in proportional_ranks(ins + outs)]


def _short(axes: Shape, ranks: Shape) -> int | Shape:
    """The int that means these ranks, where there is one."""
    return max(ranks) if TuckerFormat.of(axes, max(ranks)).ranks == ranks else ranks


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTucker(Bound):
    """Tucker with sizes. Leaves `factor0`, ... (n_k, r_k) over the input's axes, then the output's, and `core`."""

    format: TuckerFormat
    inputs: int

    @property
    def _sides(self) -> tuple[list[int], list[int]]:
        """Axes of the input in the order of contraction, and of the output in the order of their layout, which is
        expanded from its end."""
        axes, ranks, a = self.format.axes, self.format.ranks, self.inputs
        return cheapest_order(axes[:a], ranks[:a]), [a + k for k in cheapest_order(axes[a:], ranks[a:])]

    @property
    def last(self) -> str:
        """The factor applied last."""
        return f"factor{self._sides[1][0]}"

    @property
    def exact(self) -> bool:
        """A Tucker matrix is a truncated SVD."""
        return len(self.format.axes) == 2

    def _cores(self, params: Params) -> list[jax.Array]:
        return [params["core"], *(params[f"factor{k}"] for k in range(len(self.format.axes)))]

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        ranks, a = self.format.ranks, self.inputs
        names = side_axes(in_axes, a) + side_axes(out_axes, len(ranks) - a)
        wide, narrow = math.prod(ranks[:a]), math.prod(ranks[a:])
        share = len(ranks) + 1
        leaves = {}
        for k, (n, r) in enumerate(zip(self.format.axes, ranks)):
            fans = (n, r, share) if k < a else (r, n, share, r)
            leaves[f"factor{k}"] = self.factor((n, r), (names[k], None), *fans)
        leaves["core"] = self.factor(ranks, (None,) * len(ranks), wide, narrow, share, wide)
        return leaves

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        """Rows last on the way in, first in the middle, last on the way out: every step is one plain GEMM, and nothing
        but x, y and the core is transposed."""
        order = self._sides[0]
        state = x.reshape(-1, *self.format.axes[: self.inputs]).transpose(*(1 + k for k in order), 0)
        for k in order:
            state = jnp.tensordot(state, params[f"factor{k}"], ((0,), (0,)))
        return self._outward(params, state, order).reshape(*x.shape[:-1], self.d_out)

    def _outward(self, params: Params, inner: jax.Array, order: Sequence[int]) -> jax.Array:
        """inner (rows, *input ranks in `order`) -> (rows, d_out)."""
        rows, layout, ranks = inner.shape[0], self._sides[1], self.format.ranks
        core = params["core"].transpose(*order, *layout).reshape(math.prod(inner.shape[1:]), -1)
        state = (inner.reshape(rows, -1) @ core).reshape(rows, *(ranks[k] for k in layout))
        for k in reversed(layout):
            state = jnp.tensordot(params[f"factor{k}"], state, ((1,), (state.ndim - 1,)))
        back = [layout.index(k) for k in range(self.inputs, len(ranks))]
        return state.transpose(len(layout), *back).reshape(rows, self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        return self.format.materialize(self._cores(params)).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        flat = ids.reshape(-1)
        inner = jnp.ones((flat.size, 1), params["core"].dtype)
        for k, index in enumerate(jnp.unravel_index(flat, self.format.axes[: self.inputs])):
            inner = (inner[:, :, None] * params[f"factor{k}"][index][:, None, :]).reshape(flat.size, -1)
        inner = inner.reshape(flat.size, *self.format.ranks[: self.inputs])
        return self._outward(params, inner, range(self.inputs)).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """HOSVD, then HOOI, also from `like`: monotone, the best iterate, never worse than `like`; within sqrt(N) of the
        optimum over N axes, the optimum for two."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        start = None if like is None else self._cores(like)
        core, *factors = self.format.project(w.reshape(self.format.axes), like=start)
        params = {f"factor{k}": f for k, f in enumerate(factors)} | {"core": core}
        return params if self.exact else keep_better(self, w, params, like)

    def _flops(self, rows: int) -> int:
        axes, ranks, a = self.format.axes, self.format.ranks, self.inputs
        ends = reduction_flops(axes[:a], ranks[:a]) + reduction_flops(axes[a:], ranks[a:])
        return rows * (ends + 2 * math.prod(ranks))

    def _materialize_flops(self) -> int:
        return self.format.materialize_flops()
