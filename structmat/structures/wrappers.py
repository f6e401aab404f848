"""Structures around one other structure, over its parameters: frozen, scaled, transposed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, map_leaves
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Wrapper(Bound):
    """A Bound around one other Bound with the same parameters; everything is passed on unless overridden."""

    inner: Bound

    @property
    def exact(self) -> bool:
        return self.inner.exact

    @property
    def grams(self) -> str:
        return self.inner.grams

    @property
    def is_complex(self) -> bool:
        return self.inner.is_complex

    @property
    def is_linear(self) -> bool:
        return self.inner.is_linear

    @property
    def may_densify(self) -> bool:
        return self.inner.may_densify

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return self.inner.leaves(in_axes, out_axes, gain)

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        return self.inner.init(key, dtype, gain)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.matmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.rmatmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.inner.take(params, ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(params)

    def project(self, w: jax.Array, **kwargs: Any) -> dict[str, Any]:
        return self.inner.project(w, **kwargs)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        return self.inner.cost(rows, dtype, path)

    def _flops(self, rows: int) -> int:
        return self.inner._flops(rows)

    def _materialize_flops(self) -> int:
        return self.inner._materialize_flops()


@dataclasses.dataclass(frozen=True, repr=False)
class Frozen(Composite):
    """`frozen(a)`: no leaf of `a` trains."""

    a: Structure
    name: ClassVar[str] = "frozen"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundFrozen:
        inner = self.a.bind(in_shape, out_shape)
        return BoundFrozen(Frozen(inner.structure), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundFrozen(Wrapper):
    """Frozen with sizes."""

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        freeze = lambda leaf: dataclasses.replace(leaf, trainable=False)
        return map_leaves(freeze, self.inner.leaves(in_axes, out_axes, gain))


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Composite):
    """`scaled(a, s)`: W = s A with a static number s (LoRA's alpha/r, say)."""

    a: Structure
    s: float = 1.0
    name: ClassVar[str] = "scaled"

    def check(self) -> None:
        if self.s == 0:
            raise StructureError("scaled: s must not be 0")

    def _text(self, show: Callable[[Structure], str]) -> str:
        return f"scaled({show(self.a)}, s={self.s!r})"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundScaled:
        inner = self.a.bind(in_shape, out_shape)
        return BoundScaled(Scaled(inner.structure, self.s), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundScaled(Wrapper):
    """Scaled with sizes."""

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.matmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.rmatmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.take(params, ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.structure.s * self.inner.materialize(params)

    def project(self, w: jax.Array, **kwargs: Any) -> dict[str, Any]:
        """As `a`, on w / s."""
        return self.inner.project(w / self.structure.s, **kwargs)


@dataclasses.dataclass(frozen=True, repr=False)
class Transpose(Composite):
    """`transpose(a)`: W = A^T, with `a` bound the other way round."""

    a: Structure
    name: ClassVar[str] = "transpose"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundTranspose:
        return self.over(self.a.bind(out_shape, in_shape))

    def over(self, inner: Bound) -> BoundTranspose:
        """The transposed view of an existing Bound."""
        return BoundTranspose(Transpose(inner.structure), inner.out_shape, inner.in_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(out_shape, in_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTranspose(Wrapper):
    """Transpose with sizes: fans swap sides, products and grams too."""

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return map_leaves(_swap_fans, self.inner.leaves(out_axes, in_axes, gain))

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        rescale = lambda leaf, value: value if leaf.law == "index" else value * _swap_ratio(leaf)
        return map_leaves(rescale, self.inner.leaves(gain=gain), self.inner.init(key, dtype, gain))

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.rmatmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.matmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.take(self.materialize(params), ids, axis=0)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(params).T

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """As `a`, on the transposed matrix with the grams swapped."""
        self.check_dense(w)
        return self.inner.project(w.T, key=key, like=like, in_gram=out_gram, out_gram=in_gram)

    def transpose(self) -> Bound:
        return self.inner


def _swap_ratio(leaf: Leaf) -> float:
    ratio = leaf.fan_in / leaf.fan_out
    return ratio if leaf.mode == "spectral" else ratio**0.5


def _swap_fans(leaf: Leaf) -> Leaf:
    std = leaf.std * _swap_ratio(leaf)
    return dataclasses.replace(leaf, fan_in=leaf.fan_out, fan_out=leaf.fan_in, std=std, embed_fan=leaf.fan_out)
