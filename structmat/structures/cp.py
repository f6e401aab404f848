"""CP (canonical polyadic): a sum of outer products of one vector per axis (Hitchcock 1927; Carroll and Chang 1970)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound, rows_of
from structmat.structures.cp_format import CPFormat, khatri_rao, khatri_rao_size, largest_rank
from structmat.structures.descent import keep_better
from structmat.structures.factors import side_axes, side_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.tensor import Cores


@dataclasses.dataclass(frozen=True, repr=False)
class CP(Structure):
    """`cp(rank, modes=2)`: the weight's axes as the axes of a sum of `rank` outer products.

    A side of several axes keeps them; a plain side is split into its `modes` most even factors (modes=1: not at all,
    which is low rank). Parameters rank times the sum of all axes. Few parameters at many operations: the product costs
    that of a low-rank matrix of the same rank.
    """

    rank: int | None = None
    modes: int = 2
    name: ClassVar[str] = "cp"
    about: ClassVar[About] = About(
        example="cp(rank=8)",
        formula="Σ_r a₁ᵣ ⊗ ... ⊗ a_Nᵣ over the factors of n and m",
        params="R Σ n_k",
        flops="2 R (n + m)",
        nearest="heuristic: ALS from several starts, monotone (optimal for modes=1)",
        sharding="first factor of each side; all-reduce over R only",
        paper="Carroll and Chang 1970; Lebedev et al. 2015",
        when="fewest parameters per term; embeddings, spectral weights",
    )

    def check(self) -> None:
        self.need(rank=1, modes=1)

    def _axes(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, Shape]:
        split = lambda shape, what: side_factors(shape, self.modes, self.name, what)
        return split(in_shape, "d_in"), split(out_shape, "d_out")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundCP:
        self.required("rank")
        ins, outs = self._axes(in_shape, out_shape)
        most = largest_rank(ins + outs)
        if self.rank > most:
            self.choose("rank", range(max(1, most - 5), most + 1), in_shape, out_shape)
        return BoundCP(self, in_shape, out_shape, CPFormat(ins + outs, self.rank), len(ins))

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """Ranks up to the size of the dense matrix: all to 1024, beyond in steps of at most 1/1024 of the rank."""
        if self.rank is not None:
            return []
        axes = sum(self._axes(in_shape, out_shape), ())
        most = min(largest_rank(axes), max(1, math.prod(axes) // sum(axes)))
        ranks = list(range(1, min(most, 1024) + 1))
        while (after := ranks[-1] + (1 << max(0, ranks[-1].bit_length() - 11))) <= most:
            ranks.append(after)
        return [dataclasses.replace(self, rank=r) for r in ranks]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundCP(Bound):
    """CP with sizes. Leaves `factor0`, `factor1`, ... (n_k, R) over the input's axes, then the output's."""

    format: CPFormat
    inputs: int

    @property
    def last(self) -> str:
        """The factor applied last."""
        return f"factor{len(self.format.axes) - 1}"

    @property
    def exact(self) -> bool:
        """With two axes CP is low rank."""
        return len(self.format.axes) == 2

    def _cores(self, params: Params) -> list[jax.Array]:
        return [params[f"factor{k}"] for k in range(len(self.format.axes))]

    def _sides(self, params: Params) -> tuple[list[jax.Array], list[jax.Array]]:
        factors = self._cores(params)
        return factors[: self.inputs], factors[self.inputs :]

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        axes, rank, a = self.format.axes, self.format.rank, self.inputs
        names = side_axes(in_axes, a) + side_axes(out_axes, len(axes) - a)
        leaves = {}
        for k, n in enumerate(axes):
            mixes = k in (a - 1, len(axes) - 1)  # the last factor of a side mixes the terms, others scale each
            other = rank if mixes else 1
            fans = (n, other) if k < a else (other, n)
            embed = 1 if k < a else other
            leaves[f"factor{k}"] = self.factor((n, rank), (names[k], None), *fans, len(axes), embed)
        return leaves

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        ins, outs = self._sides(params)
        inner = _reduce(ins, x.reshape(rows_of(x), self.d_in))
        return _expand(outs, inner).reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        return self.format.materialize(self._cores(params)).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        ins, outs = self._sides(params)
        at = jnp.unravel_index(ids.reshape(-1), self.format.axes[: self.inputs])
        inner = functools.reduce(jnp.multiply, [f[i] for f, i in zip(ins, at)])
        return _expand(outs, inner).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Alternating least squares from singular vectors, random starts (of `key`) and `like`: monotone, the best
        iterate, never worse than `like`; the optimum for two axes."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        start = None if like is None else self._cores(like)
        factors = self.format.project(w.reshape(self.format.axes), key=key, like=start)
        params = {f"factor{k}": f for k, f in enumerate(factors)}
        return params if self.exact else keep_better(self, w, params, like)

    def _flops(self, rows: int) -> int:
        axes, a = self.format.axes, self.inputs
        return self.format.rank * sum(
            2 * rows * math.prod(side) + min(khatri_rao_size(side), _chain_size(side, rows))
            for side in (axes[:a], axes[a:])
        )

    def _materialize_flops(self) -> int:
        return self.format.materialize_flops()


def _chain_size(axes: Shape, rows: int) -> int:
    """Multiplications per term of `_reduce` and `_expand` factor by factor, beside their GEMM."""
    return rows * sum(math.prod(axes[:k]) for k in range(1, len(axes)))


def _by_factors(factors: Cores, rows: int) -> bool:
    """Whether going factor by factor is cheaper than one GEMM with the Khatri-Rao product: few rows."""
    axes = tuple(f.shape[0] for f in factors)
    return _chain_size(axes, rows) < khatri_rao_size(axes)


def _reduce(factors: Cores, x: jax.Array) -> jax.Array:
    """x (rows, n_1 ... n_k) times the Khatri-Rao product of (n_j, R) -> (rows, R)."""
    rows = x.shape[0]
    if not _by_factors(factors, rows):
        return x @ khatri_rao(factors)
    *rest, last = factors
    state = x.reshape(-1, last.shape[0]) @ last
    for f in reversed(rest):
        state = (state.reshape(-1, *f.shape) * f).sum(axis=1)
    return state.reshape(rows, -1)


def _expand(factors: Cores, inner: jax.Array) -> jax.Array:
    """inner (rows, R) times the transposed Khatri-Rao product of (n_j, R) -> (rows, n_1 ... n_k)."""
    rows = inner.shape[0]
    if not _by_factors(factors, rows):
        return inner @ khatri_rao(factors).T
    *rest, last = factors
    for f in rest:
        inner = (inner[:, None, :] * f).reshape(-1, f.shape[-1])
    return (inner @ last.T).reshape(rows, -1)
