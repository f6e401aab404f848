"""Fixed transforms: square matrices without parameters, given by the formula of their entries."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.linalg import check_gram
from structmat.structures.recipe import Structure


def need_square(structure: Structure, in_shape: Shape, out_shape: Shape) -> int:
    """The size n of an (n, n) weight.

    Raises:
      StructureError: another shape.
    """
    n, m = math.prod(in_shape), math.prod(out_shape)
    if n != m:
        raise StructureError(
            f"{structure.name}: needs a square weight, got ({n}, {m}); put it beside one that changes the size, "
            f"as in {structure.short()} @ dense()"
        )
    return n


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTransform(Bound):
    """A fixed transform with sizes: no leaves, orthonormal or unitary, computed in f32 or wider.

    A family defines `matmul`, `rmatmul`, `_flops` and `_entries`. With no leaf to follow, `materialize` and `take` give
    jax's default floating dtype (f32, or f64 in 64-bit mode); products keep the dtype of x.
    """

    grams: ClassVar[str] = "full"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        return {}

    def _entries(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Entries W[i, j] of broadcastable int32 index arrays in the default floating dtype."""
        raise TypeError(f"{type(self).__name__} does not define _entries")

    def materialize(self, params: Params) -> jax.Array:
        n = jnp.arange(self.d_in, dtype=jnp.int32)
        return self._entries(n[:, None], n)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self._entries(ids[..., None], jnp.arange(self.d_out, dtype=jnp.int32))

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum under any gram: the class has one member, and no parameters."""
        self.check_dense(w)
        for gram, size, what in ((in_gram, self.d_in, "in_gram"), (out_gram, self.d_out, "out_gram")):
            if gram is not None:
                check_gram(gram, size, what)
        return {}

    def _materialize_flops(self) -> int:
        return 0


def multiply_mod(a: jax.Array, b: jax.Array, m: int) -> jax.Array:
    """a b mod m of unsigned 32-bit integers below m < 2^30, without overflow: b is taken a few bits at a time."""
    bits = m.bit_length()
    step = 31 - bits
    a, b = a.astype(jnp.uint32), b.astype(jnp.uint32)
    result = jnp.zeros((), jnp.uint32)
    for shift in reversed(range(0, bits, step)):
        result = ((result << step) + a * ((b >> shift) & (2**step - 1))) % m
    return result


def cosine(turn: jax.Array, m: int) -> jax.Array:
    """cos(2 pi turn / m) of unsigned integers turn < m, m a multiple of 4, to the accuracy of the default dtype.

    The angle is reduced to a quarter turn in integers, so that it carries no error from its size.
    """
    half = jnp.minimum(turn, m - turn)
    quarter = jnp.minimum(half, m // 2 - half)
    value = jnp.cos(quarter.astype(jnp.result_type(float)) * (2 * math.pi / m))
    return jnp.where(half > m // 4, -value, value)
