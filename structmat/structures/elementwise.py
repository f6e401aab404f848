"""Elementwise products of structures (Hadamard products; of two low-rank matrices: FedPara, Hyeon-Woo et al. 2022)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.algebra import BoundProduct, BoundSum, Sum, most_share, scales, trains
from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.diagonal import BoundDiagonal
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, flatten_leaves, map_leaves
from structmat.structures.low_rank import BoundLowRank
from structmat.structures.recipe import Structure
from structmat.structures.spectral import BoundSpectral
from structmat.structures.wrappers import BoundFrozen, BoundScaled, BoundTranspose, Wrapper


@dataclasses.dataclass(frozen=True, repr=False)
class Elementwise(Composite):
    """`a * b`: W[i, j] = A[i, j] B[i, j]. Parameters nest under `0` (a) and `1` (b).

    Products: with a diagonal operand W is diagonal; with an operand of low rank r (low_rank, spectral, also frozen,
    scaled or transposed) W = sum_r diag(u_r) B diag(v_r) is r products with B, taken where that costs less per row than
    a dense product; otherwise W is rebuilt in forward and backward and multiplied as one GEMM.

    Initialisation: entries of variance 1/d_in on both sides would give an output of power 1/d_in. So b starts larger
    than it would alone (a, where only a trains or can be scaled), such that E[y^2] = E[x^2] under `variance`. Under
    `spectral` the power is min(1, d_out/d_in, d_in p_a p_b), p being that of each side alone: r_a r_b / d_in for two low
    ranks, which is what a matrix of rank r_a r_b starts with. Exact where the entries of one side have equal variance.
    `transpose(a) * transpose(b)` keeps this for d_in != d_out, `transpose(a * b)` does not.
    """

    a: Structure
    b: Structure
    name: ClassVar[str] = "elementwise"

    def _text(self, show: Callable[[Structure], str]) -> str:
        left = f"({show(self.a)})" if isinstance(self.a, Sum) else show(self.a)
        right = f"({show(self.b)})" if isinstance(self.b, Sum | Elementwise) else show(self.b)
        return f"{left} * {right}"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundElementwise:
        a, b = self.a.bind(in_shape, out_shape), self.b.bind(in_shape, out_shape)
        return BoundElementwise(Elementwise(a.structure, b.structure), in_shape, out_shape, a, b)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundElementwise(Bound):
    """Elementwise product with sizes."""

    a: Bound
    b: Bound

    exact: ClassVar[bool] = False

    @property
    def is_complex(self) -> bool:
        return self.a.is_complex or self.b.is_complex

    @property
    def route(self) -> str:
        """How products are computed: `diagonal`, `rank 0` or `rank 1` (the operand split into rank ones) or `dense`."""
        sides = (self.a, self.b)
        if any(isinstance(_core(side), BoundDiagonal) for side in sides):
            return "diagonal"
        costs = {"dense": 2 * self.d_in * self.d_out}
        for k, (side, other) in enumerate((sides, sides[::-1])):
            if rank := _rank(side):
                costs[f"rank {k}"] = rank * (self.d_in + self.d_out) + other._flops(rank)
        return min(costs, key=costs.get)

    def _gains(self, gain: float) -> tuple[float, float]:
        """A gain, and what makes up for the small entries, act on b, or on a where only that trains or can be scaled."""
        if not scales(self.a) and not scales(self.b):
            return 1.0, gain
        first = (trains(self.a) and not trains(self.b)) or not scales(self.b)
        a, b = self.a.leaves(), self.b.leaves()
        spectral = all(leaf.mode == "spectral" for _, leaf in flatten_leaves({"0": a, "1": b}))
        most = min(1.0, self.d_out / self.d_in) if spectral else 1.0
        both = _power(self.a, a) * _power(self.b, b)
        whole = gain * math.sqrt(self.d_in * min(self.d_in, most / both if both else 1.0))
        return (whole, 1.0) if first else (1.0, whole)

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        sides = [
            _one_hot(side, side.leaves(in_axes, out_axes, g), own)
            for side, g, own in zip((self.a, self.b), self._gains(gain), self._gains(1.0))
        ]
        both = trains(self.a) and trains(self.b)
        add = lambda n: lambda leaf: dataclasses.replace(leaf, share=leaf.share + n) if both else leaf
        shares = [most_share(side) for side in reversed(sides)]
        return {str(k): map_leaves(add(n), side) for k, (side, n) in enumerate(zip(sides, shares))}

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        keys, (ga, gb) = jax.random.split(key), self._gains(gain)
        return {"0": self.a.init(keys[0], dtype, ga), "1": self.b.init(keys[1], dtype, gb)}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self._multiply(params, x, False)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self._multiply(params, y, True)

    def _multiply(self, params: Params, x: jax.Array, flipped: bool) -> jax.Array:
        if self.route == "diagonal":
            return x * (_diagonal(self.a, params["0"]) * _diagonal(self.b, params["1"]))
        if self.route == "dense":
            turned = lambda w: w.T if flipped else w
            return jax.checkpoint(lambda p, x: x @ turned(self.materialize(p)))(params, x)
        split, other = (self.a, self.b)[:: 1 if self.route == "rank 0" else -1]
        mine, its = ("0", "1")[:: 1 if self.route == "rank 0" else -1]
        before, after = _rank_ones(split, params[mine])[:: -1 if flipped else 1]
        product = other.rmatmul if flipped else other.matmul
        spread = x.reshape(-1, x.shape[-1]) * before[:, None]
        y = jnp.sum(product(params[its], spread) * after[:, None], axis=0)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.a.take(params["0"], ids) * self.b.take(params["1"], ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.a.materialize(params["0"]) * self.b.materialize(params["1"])

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """Refused: two arbitrary structured operands have no projection with a guarantee."""
        raise StructureError(
            f"{self.structure.short()}: no projection onto an elementwise product; project onto one of its operands, "
            "or onto a sum"
        )

    def _flops(self, rows: int) -> int:
        route, sides = self.route, (self.a, self.b)
        if route == "diagonal":
            return (rows + 1) * self.d_in + sum(_diagonal_flops(side) for side in sides)
        if route == "dense":
            return self._materialize_flops() + 2 * rows * self.d_in * self.d_out
        split, other = sides[:: 1 if route == "rank 0" else -1]
        rank = _rank(split)
        return _rank_ones_flops(split) + rank * rows * (self.d_in + self.d_out) + other._flops(rank * rows)

    def _materialize_flops(self) -> int:
        return self.a._materialize_flops() + self.b._materialize_flops() + self.d_in * self.d_out


def _power(bound: Bound, leaves: Leaves) -> float:
    """E[y^2] / E[x^2] at initialisation, as the leaves declare it."""
    if isinstance(bound, BoundSum):
        return sum(_power(term, leaves[str(k)]) for k, term in enumerate(bound.terms))
    if isinstance(bound, BoundProduct | BoundElementwise):
        both = _power(bound.a, leaves["0"]) * _power(bound.b, leaves["1"])
        return both if isinstance(bound, BoundProduct) else both / bound.d_in
    if isinstance(bound, BoundFrozen | BoundScaled | BoundTranspose):
        return _power(bound.inner, leaves) * (bound.structure.s**2 if isinstance(bound, BoundScaled) else 1)
    return math.prod(leaf.std**2 * leaf.fan_in for _, leaf in flatten_leaves(leaves) if leaf.law != "index")


def _one_hot(side: Bound, leaves: Leaves, gain: float) -> Leaves:
    """Leaves of a side with `gain` taken back for one-hot inputs, where entries of both sides have variance 1 anyway."""

    def undo(leaf: Leaf, plain: Leaf, twice: Leaf) -> Leaf:
        grown = 1 if plain.std == twice.std else gain**2
        return dataclasses.replace(leaf, embed_fan=max(1, round(leaf.embed_fan * grown)))

    return map_leaves(undo, leaves, side.leaves(), side.leaves(gain=2.0)) if gain != 1.0 else leaves


def _core(bound: Bound) -> Bound:
    """What frozen, scaled and transposed are around."""
    while isinstance(bound, BoundFrozen | BoundScaled | BoundTranspose):
        bound = bound.inner
    return bound


def _rank(bound: Bound) -> int:
    """Rank of a matrix given as a sum of rank ones, else 0."""
    core = _core(bound)
    return core.structure.rank if isinstance(core, BoundLowRank | BoundSpectral) else 0


def _rank_ones(bound: Bound, params: Params) -> tuple[jax.Array, jax.Array]:
    """u (r, d_in) and v (r, d_out) with W = sum_r u_r v_r^T, for a Bound with a `_rank`."""
    if isinstance(bound, Wrapper):
        u, v = _rank_ones(bound.inner, params)
        if isinstance(bound, BoundTranspose):
            return v, u
        return (bound.structure.s * u, v) if isinstance(bound, BoundScaled) else (u, v)
    if isinstance(bound, BoundSpectral):
        return params["u"] * params["s"][:, None], params["v"]
    return params["a"], params["b"]


def _rank_ones_flops(bound: Bound) -> int:
    core = _core(bound)
    return core.structure.rank * core.d_in if isinstance(core, BoundSpectral) else 0


def _diagonal(bound: Bound, params: Params) -> jax.Array:
    """The diagonal of a square matrix, without forming it where it is a diagonal or a sum of rank ones."""
    if isinstance(bound, BoundDiagonal):
        return params["d"]
    if _rank(bound):
        u, v = _rank_ones(bound, params)
        return jnp.sum(u * v, axis=0)
    if isinstance(bound, BoundFrozen | BoundTranspose):
        return _diagonal(bound.inner, params)
    if isinstance(bound, BoundScaled):
        return bound.structure.s * _diagonal(bound.inner, params)
    return bound.materialize(params).reshape(-1)[:: bound.d_in + 1]


def _diagonal_flops(bound: Bound) -> int:
    if rank := _rank(bound):
        return _rank_ones_flops(bound) + rank * bound.d_in
    return 0 if isinstance(_core(bound), BoundDiagonal) else _core(bound)._materialize_flops()
