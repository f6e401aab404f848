"""Dense: the unstructured matrix every other family is measured against."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(Structure):
    """`dense()`: W itself. Leaf `kernel` (d_in, d_out). `paper` init is Flax's lecun_normal without truncation."""

    name: ClassVar[str] = "dense"
    about: ClassVar[About] = About(
        example="dense()",
        formula="any matrix",
        params="n m",
        flops="2 n m",
        nearest="itself",
        sharding="both axes; as every dense layer",
        paper="-",
        when="the baseline",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundDense:
        return BoundDense(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundDense(Bound):
    """Dense with sizes."""

    grams: ClassVar[str] = "full"
    last: ClassVar[str] = "kernel"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        axes = (first_axis(in_axes), first_axis(out_axes))
        leaf = self.factor((self.d_in, self.d_out), axes, self.d_in, self.d_out, share=1)
        if self.structure.init == "paper":
            leaf = dataclasses.replace(leaf, std=self.d_in**-0.5, law="normal")
        return {"kernel": leaf}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    def materialize(self, params: Params) -> jax.Array:
        return params["kernel"]

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return y @ params["kernel"].T

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """Exact for any gram: the matrix itself."""
        self.check_dense(w)
        return {"kernel": jnp.asarray(w)}

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.d_in * self.d_out

    def _materialize_flops(self) -> int:
        return 0
