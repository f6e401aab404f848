"""Diagonal: one number per coordinate, square only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Diagonal(Structure):
    """`diagonal()`: W = diag(d), d_in = d_out. `paper` init is the identity, where scaling layers start."""

    name: ClassVar[str] = "diagonal"
    about: ClassVar[About] = About(
        example="diagonal()",
        formula="diag(w)",
        params="n",
        flops="n",
        nearest="optimal, diagonal grams",
        sharding="over n",
        paper="-",
        when="scaling; in products and sums",
    )
    square: ClassVar[bool] = True

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundDiagonal:
        n, m = math.prod(in_shape), math.prod(out_shape)
        if n != m:
            raise StructureError(
                f"diagonal: needs a square weight, got ({n}, {m}); put it beside one that changes the size, "
                f"as in diagonal() @ dense()"
            )
        return BoundDiagonal(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundDiagonal(Bound):
    """Diagonal with sizes. Leaf `d` (d_in,)."""

    grams: ClassVar[str] = "diagonal"
    last: ClassVar[str] = "d"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        ones = {"law": "ones", "std": 1.0} if self.structure.init == "paper" else {}
        return {"d": self.factor((self.d_in,), (first_axis(in_axes),), 1, 1, share=1, decay=False, **ones)}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return x * params["d"]

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return y * params["d"]

    def materialize(self, params: Params) -> jax.Array:
        return jnp.diag(params["d"])

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        here = ids[..., None] == jnp.arange(self.d_in)
        return jnp.where(here, params["d"], jnp.zeros((), params["d"].dtype))

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the diagonal of w, whatever the weights of diagonal grams."""
        self.check_dense(w)
        for what, gram, size in (("in_gram", in_gram, self.d_in), ("out_gram", out_gram, self.d_out)):
            if gram is not None:
                diagonal_roots(gram, size, what, self.structure.name)
        return {"d": jnp.diagonal(w)}

    def _flops(self, rows: int) -> int:
        return rows * self.d_in

    def _materialize_flops(self) -> int:
        return 0
