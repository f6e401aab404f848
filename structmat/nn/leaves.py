"""How a module declares the leaves of a Bound: trainable ones in `params`, the rest in `frozen`, one key for both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from structmat.nn.sites import branches, merge
from structmat.structures import Bound, Leaf
from structmat.structures.leaf import Axes, map_leaves

RESERVED = ("bias",)


@flax.struct.dataclass
class Annotated(nn.LogicallyPartitioned):
    """A leaf with its logical axes; unlike its base it may name one axis twice and constrains nothing by itself.

    The constraint of the base is refused by Flax for a weight whose two sides share an axis (embed to embed); where
    a leaf lives is decided once, by structmat.parallel, from these names.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The array, without constraint."""
        return self.value


def split(leaves: Mapping[str, Any], values: Mapping[str, Any], trainable: bool) -> dict[str, Any]:
    """The nested part of `values` whose leaves are (not) trainable; empty branches are dropped."""
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            if leaf.trainable == trainable:
                out[name] = values[name]
        elif inner := split(leaf, values[name], trainable):
            out[name] = inner
    return out


def declare(
    module: nn.Module,
    bound: Bound,
    in_axes: Axes,
    out_axes: Axes,
    param_dtype: Any,
    gain: float = 1.0,
    rescale: Callable[[Leaf], float] | None = None,
) -> dict[str, Any]:
    """Create or read the parameters of `bound` in the scope of `module`, annotated with their logical axes.

    Initialisation draws all leaves from one key, so that joint initialisations agree across the two collections.
    """
    leaves = bound.leaves(in_axes, out_axes, gain)
    if clash := set(leaves) & set(RESERVED):
        raise ValueError(f"{bound!r}: leaf name {clash} is reserved for the module")
    if module.is_initializing():
        values = bound.init(module.make_rng("params"), param_dtype, gain)
        if rescale is not None:
            values = map_leaves(lambda leaf, v: v if leaf.law == "index" else v * rescale(leaf), leaves, values)
    else:
        values = map_leaves(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or param_dtype), leaves)

    def boxed(leaf: Leaf, value: Any) -> Annotated:
        if isinstance(value, jax.ShapeDtypeStruct):
            value = jnp.zeros(value.shape, value.dtype)
        return Annotated(value, leaf.axes)

    found: dict[str, Any] = {}
    for name, value in split(leaves, values, True).items():
        part = {name: leaves[name]}
        init = lambda _, part=part, value=value, name=name: _box(part, {name: value}, boxed, True)[name]
        found[name] = module.param(name, init)
    for name, value in split(leaves, values, False).items():
        part = {name: leaves[name]}
        init = lambda part=part, value=value, name=name: _box(part, {name: value}, boxed, False)[name]
        held = module.variable("frozen", name, init).value
        found = merge(found, {name: held})
    return merge(branches(leaves), found)


def _box(
    leaves: Mapping[str, Any], values: Mapping[str, Any], boxed: Callable[..., Any], trainable: bool
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            if leaf.trainable == trainable:
                out[name] = boxed(leaf, values[name])
        elif name in values:
            if inner := _box(leaf, values[name], boxed, trainable):
                out[name] = inner
    return out


def cast(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Real floating leaves in `dtype`; indices and complex leaves as they are."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, dict(params))


def compute_dtype(dtype: Any, x: jax.Array, params: Mapping[str, Any]) -> Any:
    """The dtype a module computes in: as asked, else promoted from input and real floating leaves."""
    if dtype is not None:
        return dtype
    floats = [a.dtype for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.result_type(x.dtype, *floats) if floats else x.dtype


def embed_scale(leaf: Leaf) -> float:
    """Factor from a leaf's matrix initialisation to one that gives rows of RMS 1 for one-hot inputs."""
    if leaf.mode == "paper" or leaf.law == "ones":
        return 1.0
    f, g = leaf.fan_in, leaf.fan_out
    std = math.sqrt(min(f, g)) / f if leaf.mode == "spectral" else f**-0.5
    return leaf.embed_fan**-0.5 / std
