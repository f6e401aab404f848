"""What a structure declares about its arrays (`Leaf`) and what a product costs (`Cost`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

Shape = tuple[int, ...]
Axes = str | tuple[str | None, ...] | None
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a structure, declared once; init, sharding, learning rates, decay and bits all derive from it.

    Attributes:
      shape: of the array.
      axes: logical axis name (or None) per dimension.
      fan_in: how many inputs of RMS 1 one output of this factor's product sums over.
      fan_out: how many outputs one input of this factor's product reaches.
      std: standard deviation at initialisation.
      law: `normal`, `uniform` (of that std), `ones` (times std), `index` (drawn by the family), `derived`
        (computed by the family from its other leaves) or `orthogonal` (drawn by the family so that its factor is orthogonal).
      dtype: None for the parameter dtype asked for at init, else fixed (int32 for indices).
      trainable: False for frozen and integer leaves; those live in the Flax collection `frozen`.
      decay: whether weight decay applies.
      share: number of trainable factors in the chain times number of trainable terms in the sum; the learning-rate
        multiplier is divided by it.
      embed_fan: fan_in when the input is one-hot (embeddings).
      mode: the init mode `std` follows, so that a transposed view can follow it too.
      fixed_rate: the learning-rate multiplier is 1 (learned scales, which see no fan).
      capped: whether `weight_norm` caps it.
    """

    shape: Shape
    axes: tuple[str | None, ...]
    fan_in: int
    fan_out: int
    std: float
    law: str = "normal"
    dtype: Any = None
    trainable: bool = True
    decay: bool = True
    share: int = 1
    embed_fan: int = 1
    mode: str = "spectral"
    fixed_rate: bool = False
    capped: bool = True

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def bits(self, dtype: Any = jnp.float32) -> int:
        """Stored bits when free leaves are kept in `dtype`."""
        return self.size * jnp.dtype(self.dtype or dtype).itemsize * 8


Leaves = dict[str, "Leaf | Leaves"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product costs.

    Attributes:
      params: stored real numbers (a complex entry is two); indices are not parameters.
      bits: stored bits, indices, masks and scales included.
      flops: floating point operations of the structure's own algorithm, 2 per multiply-add; a complex FFT of length N
        counts 5 N log2 N and a real one half of it, the usual convention.
      flops_executed: the same for the path taken (`dense` materialises first).
      bytes: memory traffic of a product that reads weights and input once and writes the output once.
    """

    params: int
    bits: int
    flops: int
    flops_executed: int
    bytes: int


def flatten_leaves(leaves: Leaves, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Yield (slash path, Leaf) in declared order."""
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            yield prefix + name, leaf
        else:
            yield from flatten_leaves(leaf, f"{prefix}{name}/")


def map_leaves(fn: Any, leaves: Leaves, *rest: Any) -> dict[str, Any]:
    """Apply `fn(leaf, *rest_values)` over a nested dict of leaves, keeping its nesting."""
    return {
        name: fn(leaf, *(r[name] for r in rest))
        if isinstance(leaf, Leaf)
        else map_leaves(fn, leaf, *(r[name] for r in rest))
        for name, leaf in leaves.items()
    }


def first_axis(axes: Axes) -> str | None:
    """The logical axis of a flattened side: the name of its leading dimension."""
    return axes if axes is None or isinstance(axes, str) else (axes[0] if axes else None)


def count_params(leaf: Leaf) -> int:
    """Real numbers in a leaf: a complex entry is two, an index is none."""
    dtype = jnp.dtype(leaf.dtype or jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 2 * leaf.size
    return leaf.size if jnp.issubdtype(dtype, jnp.floating) else 0
