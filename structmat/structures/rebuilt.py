"""`rebuilt(a)`: the dense matrix is formed for every product, and formed again for the gradients instead of being kept.

What SLTrain does (Han et al., arXiv 2406.02214): the GEMM of a dense layer, without its memory. Between the passes only x
and the parameters of `a` live; the gradient by the dense matrix is a temporary of the backward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.leaf import Cost, Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.wrappers import Wrapper


@dataclasses.dataclass(frozen=True, repr=False)
class Rebuilt(Composite):
    """`rebuilt(a)`: W = A, multiplied as one GEMM; no FLOPs are saved, and W is never kept for the gradients."""

    a: Structure
    name: ClassVar[str] = "rebuilt"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundRebuilt:
        inner = self.a.bind(in_shape, out_shape)
        return BoundRebuilt(Rebuilt(inner.structure), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundRebuilt(Wrapper):
    """Rebuilt with sizes; parameters are those of `a`."""

    may_densify: ClassVar[bool] = False

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda params, x: x @ self._dense(params, x))(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda params, y: y @ self._dense(params, y).T)(params, y)

    def _dense(self, params: Params, like: jax.Array) -> jax.Array:
        w = self.inner.materialize(params)
        return w if self.is_complex else w.astype(like.dtype)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """As of any structure; both paths are the same."""
        return Bound.cost(self, rows, dtype, "factored")

    def _flops(self, rows: int) -> int:
        return self.inner._materialize_flops() + 2 * rows * self.d_in * self.d_out
