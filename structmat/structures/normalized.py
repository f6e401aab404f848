"""Wrappers that compute the weights of another structure from its stored leaves: weight_norm, fake_quantized, dora."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.block_low_rank import BoundBlockLowRank
from structmat.structures.composite import Composite
from structmat.structures.dense import BoundDense
from structmat.structures.descent import keep_better
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, map_leaves
from structmat.structures.linalg import scale_rows
from structmat.structures.low_rank import BoundLowRank
from structmat.structures.recipe import Structure
from structmat.structures.reparam import fake_quantize, rms_cap, rms_excess
from structmat.structures.wrappers import Wrapper


@dataclasses.dataclass(frozen=True, repr=False)
class Reparametrised(Composite):
    """Base of `weight_norm`, `fake_quantized` and `dora`: one structure `a` whose arguments stay free for `fit`."""

    a: Structure

    bound: ClassVar[type[Reparametrisation]]

    def _bind(self, in_shape: Shape, out_shape: Shape) -> Bound:
        inner = self.a.bind(in_shape, out_shape)
        return self.bound(dataclasses.replace(self, a=inner.structure), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class Reparametrisation(Wrapper):
    """Products go through the inner Bound with its effective parameters.

    FLOPs are those of `a`: work on the leaves alone does not grow with the rows and is not counted.
    """

    def effective(self, params: Params) -> dict[str, Any]:
        """The parameters of the inner Bound that `params` stand for."""
        raise TypeError(f"{type(self).__name__} does not define effective")

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.matmul(self.effective(params), x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.rmatmul(self.effective(params), y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.inner.take(self.effective(params), ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(self.effective(params))

    def auxiliary(self, params: Params, x: jax.Array) -> jax.Array | None:
        """That of the inner Bound."""
        return self.inner.auxiliary(self.effective(params), x)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        own = Bound.cost(self, rows, dtype, path)
        executed = self.inner.cost(rows, dtype, path).flops_executed
        return own if path == "dense" else dataclasses.replace(own, flops_executed=executed)


def _chosen(leaves: Leaves, wanted: Callable[[Leaf], bool]) -> dict[str, Any]:
    """The nested part of `leaves` that is wanted; empty branches are dropped."""
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            if wanted(leaf):
                out[name] = leaf
        elif inner := _chosen(leaf, wanted):
            out[name] = inner
    return out


def _capped(leaves: Leaves) -> dict[str, Any]:
    """What weight norm acts on."""
    return _chosen(leaves, lambda leaf: leaf.trainable and leaf.capped)


def _on(fn: Any, chosen: dict[str, Any], values: Params, *rest: Any) -> dict[str, Any]:
    """`values` with `fn(leaf, value, *rest)` at the leaves of `chosen` and unchanged elsewhere."""
    out = dict(values)
    for name, leaf in chosen.items():
        args = (leaf, values[name], *(r[name] for r in rest))
        out[name] = fn(*args) if isinstance(leaf, Leaf) else _on(fn, *args)
    return out


def _sigma(leaf: Leaf) -> float:
    """The cap: the leaf's std at initialisation, for leaves that start at zero that of `spectral`."""
    return leaf.std or math.sqrt(min(leaf.fan_in, leaf.fan_out)) / leaf.fan_in


@dataclasses.dataclass(frozen=True, repr=False)
class BoundWeightNorm(Reparametrisation):
    """Weight norm with sizes: the leaves of `a` under `weights`, one scalar for each that trains under `gamma`."""

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        ratios, weights = self._ratios(gain), self.inner.leaves(in_axes, out_axes, gain)
        unscaled = lambda leaf, _, ratio: dataclasses.replace(leaf, std=leaf.std / ratio)
        # Fans as its leaf: where an embedding enlarges the leaf, the cap takes it back and gamma has to carry it.
        own = {"shape": (), "axes": (), "law": "derived", "dtype": None, "decay": False, "fixed_rate": True}
        scalar = lambda leaf, ratio: dataclasses.replace(leaf, std=ratio, **own)
        chosen = _capped(weights)
        return {
            "weights": _on(unscaled, chosen, weights, ratios),
            "gamma": map_leaves(scalar, chosen, ratios),
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        ratios, chosen = self._ratios(gain), _capped(self.inner.leaves())
        unscaled = lambda _, value, ratio: value / ratio
        return {
            "weights": _on(unscaled, chosen, self.inner.init(key, dtype, gain), ratios),
            "gamma": map_leaves(lambda _, ratio: jnp.full((), ratio, dtype), chosen, ratios),
        }

    def _ratios(self, gain: float) -> dict[str, Any]:
        """What gamma starts at: a gain other than 0 goes there, for the cap would take it from the weights."""
        ratio = lambda scaled, plain: scaled.std / plain.std if scaled.std and plain.std else 1.0
        return map_leaves(ratio, _capped(self.inner.leaves(gain=gain)), self.inner.leaves())

    def effective(self, params: Params) -> dict[str, Any]:
        cap = lambda leaf, w, gamma: rms_cap(w, gamma, _sigma(leaf))
        return _on(cap, _capped(self.inner.leaves()), params["weights"], params["gamma"])

    def project(self, w: jax.Array, *, like: Params | None = None, **kwargs: Any) -> dict[str, Any]:
        """As `a`, with the same guarantee: every gamma is set so that its leaf comes out as projected."""
        weights = self.inner.project(w, like=None if like is None else self.effective(like), **kwargs)
        chosen = _capped(self.inner.leaves())
        excess = lambda leaf, value: rms_excess(value, _sigma(leaf)).astype(jnp.finfo(value.dtype).dtype)
        return {"weights": weights, "gamma": map_leaves(excess, chosen, weights)}


@dataclasses.dataclass(frozen=True, repr=False)
class WeightNorm(Reparametrised):
    """`weight_norm(a)`: every trainable leaf M of `a`, gates apart, acts as gamma M / max(1, RMS(M) / sigma).

    sigma is the leaf's standard deviation at initialisation and gamma a learned scalar that starts at 1 (Qiu et al.
    2024, who need it for block tensor trains in GPT-2). Write weight_norm(transpose(a)): the caps of
    transpose(weight_norm(a)) are those of the other orientation.
    """

    name: ClassVar[str] = "weight_norm"
    adds_auxiliary: ClassVar[bool] = True
    bound: ClassVar[type[Reparametrisation]] = BoundWeightNorm


@dataclasses.dataclass(frozen=True, repr=False)
class BoundFakeQuantized(Reparametrisation):
    """Fake quantisation with sizes; the parameters are those of `a`, stored in full precision."""

    exact: ClassVar[bool] = False

    def effective(self, params: Params) -> dict[str, Any]:
        bits, group = self.structure.bits, self.structure.group
        rounded = lambda leaf, w: fake_quantize(w, bits, min(group, leaf.size))
        return _on(rounded, self._rounded(), params)

    def _rounded(self) -> dict[str, Any]:
        """Every leaf but indices: what does not train is rounded as well."""
        return _chosen(self.leaves(), lambda leaf: leaf.law != "index")

    def project(self, w: jax.Array, *, like: Params | None = None, **kwargs: Any) -> dict[str, Any]:
        """`a`'s projection, rounded in use: no optimum, but never worse than `like`."""
        new = self.inner.project(w, like=None if like is None else self.effective(like), **kwargs)
        return keep_better(self, w, new, like, kwargs.get("in_gram"), kwargs.get("out_gram"))


@dataclasses.dataclass(frozen=True, repr=False)
class FakeQuantized(Reparametrised):
    """`fake_quantized(a, bits, group=128)`: every leaf of `a` is rounded to `bits` bits in use, gradients pass through.

    One scale per `group` consecutive entries of a leaf. Simulated: stored and executed in full precision, and counted so.
    """

    bits: int = 8
    group: int = 128
    name: ClassVar[str] = "fake_quantized"
    adds_auxiliary: ClassVar[bool] = True
    bound: ClassVar[type[Reparametrisation]] = BoundFakeQuantized

    def check(self) -> None:
        self.need(bits=2, group=1)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundDora(Reparametrisation):
    """DoRA with sizes: the leaves of `a` (V) under `weights`, and `magnitude` (d_out,)."""

    @property
    def exact(self) -> bool:
        """Scaling columns must not leave the family, or the refitted projection is not known to be the optimum."""
        return isinstance(self.inner, BoundDense | BoundLowRank | BoundBlockLowRank)

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        weights = self.inner.leaves(in_axes, out_axes)
        std = gain * min(self.d_in, self.d_out) ** 0.5 / self.d_in**0.5
        axis = out_axes if out_axes is None or isinstance(out_axes, str) else out_axes[0]
        magnitude = Leaf((self.d_out,), (axis,), self.d_in, self.d_out, std, "derived", decay=False, fixed_rate=True)
        return {"weights": weights, "magnitude": magnitude}

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        weights = self.inner.init(key, dtype)
        return {"weights": weights, "magnitude": gain * self._norms(weights).astype(dtype)}

    def _norms(self, weights: Params) -> jax.Array:
        """Column norms (d_out,) of V; the dense matrix they need is rebuilt in the backward pass, not kept."""

        def norms(weights: Params) -> jax.Array:
            v = self.inner.materialize(weights)
            square = jnp.sum(jnp.real(v * jnp.conj(v)), axis=0, dtype=jnp.promote_types(v.real.dtype, jnp.float32))
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0).astype(v.real.dtype)

        return jax.checkpoint(norms)(weights)

    def _scale(self, params: Params) -> jax.Array:
        norms = self._norms(params["weights"])
        return jnp.where(norms > 0, params["magnitude"] / jnp.where(norms > 0, norms, 1), 0)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.matmul(params["weights"], x) * self._scale(params)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.rmatmul(params["weights"], y * self._scale(params))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.inner.take(params["weights"], ids) * self._scale(params)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(params["weights"]) * self._scale(params)

    def project(self, w: jax.Array, *, like: Params | None = None, **kwargs: Any) -> dict[str, Any]:
        """`a`'s projection with every magnitude refitted to its column: nearer to `w` than `a` alone, or equal.

        The refit is the least-squares one (also with any in_gram); with a full out_gram columns do not separate and the
        magnitudes are those of the projection. Never worse than `like`.
        """
        inner_like = None if like is None else like["weights"]
        weights = self.inner.project(w, like=inner_like, **kwargs)
        v = self.inner.materialize(weights)
        norms, gram = self._norms(weights), kwargs.get("out_gram")
        factor = jnp.ones((), v.dtype)
        if gram is None or gram.ndim == 1:
            weighted = scale_rows(kwargs.get("in_gram"), v)
            along, own = jnp.sum(weighted * w, axis=0), jnp.sum(weighted * v, axis=0)
            factor = jnp.where(own > 0, along / jnp.where(own > 0, own, 1), 1)
        new = {"weights": weights, "magnitude": (norms * factor).astype(norms.dtype)}
        return keep_better(self, w, new, like, kwargs.get("in_gram"), gram)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """`flops` of the product with given norms; `flops_executed` adds the norms, which materialise V."""
        cost = super().cost(rows, dtype, path)
        if path == "dense":
            return cost
        return dataclasses.replace(cost, flops_executed=cost.flops + self._materialize_flops())

    def _flops(self, rows: int) -> int:
        return self.inner._flops(rows) + rows * self.d_out

    def _materialize_flops(self) -> int:
        return self.inner._materialize_flops() + 3 * self.d_in * self.d_out


@dataclasses.dataclass(frozen=True, repr=False)
class Dora(Reparametrised):
    """`dora(a)`: W = m V / |V|, columnwise, with V given by `a` and a learned magnitude m (d_out,).

    Liu et al. 2024, "DoRA", arXiv 2402.09353. m starts at the column norms of V, so that W starts at `a`. The norms need
    the dense matrix, so every product executes its materialisation as well; gradients flow through the norms.
    """

    name: ClassVar[str] = "dora"
    bound: ClassVar[type[Reparametrisation]] = BoundDora
