"""Identity: nothing stored, square only; a neutral factor or term."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.linalg import check_gram
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(Structure):
    """`identity()`: W = I, d_in = d_out. `identity() + low_rank(rank=8)` starts exactly at the identity."""

    name: ClassVar[str] = "identity"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="identity()",
        formula="I",
        params="0",
        flops="0",
        nearest="optimal (the only member), any grams",
        sharding="nothing stored",
        paper="-",
        when="a residual term, or the default of a rule",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundIdentity:
        n, m = math.prod(in_shape), math.prod(out_shape)
        if n != m:
            raise StructureError(
                f"identity: needs a square weight, got ({n}, {m}); put it beside one that changes the size, as in "
                f"identity() @ dense()"
            )
        return BoundIdentity(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundIdentity(Bound):
    """Identity with sizes. No leaves; `materialize` and `take` give weakly typed floats, which take the other side's."""

    grams: ClassVar[str] = "full"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        return {}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return x

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return y

    def materialize(self, params: Params) -> jax.Array:
        return self.take(params, jnp.arange(self.d_in))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.where(ids[..., None] == jnp.arange(self.d_in), 1.0, 0.0)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The only member, whatever w."""
        self.check_dense(w)
        for what, gram, size in (("in_gram", in_gram, self.d_in), ("out_gram", out_gram, self.d_out)):
            if gram is not None:
                check_gram(gram, size, what)
        return {}

    def _flops(self, rows: int) -> int:
        return 0
