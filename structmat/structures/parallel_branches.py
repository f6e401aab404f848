"""A sum of equal branches, each followed by a nonlinearity: the parallel member of Sparse-IFT.

Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency", ICML 2024. Not a matrix:
it multiplies, initialises, shards and counts like one, and refuses to be materialised or projected.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NoReturn

import jax
import jax.numpy as jnp

from structmat.structures.algebra import BoundSum, Sum
from structmat.structures.base import Bound
from structmat.structures.bottleneck import ACTIVATIONS
from structmat.structures.composite import Composite
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaves, Params, Shape
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Parallel(Composite):
    """`parallel(a, count=4, activation='relu')`: y = sum over i < count of activation(x A_i), every A_i of structure `a`.

    At initialisation each branch has 1/count of the variance of `a`, as a term of a sum has. The paper normalises every
    branch before its nonlinearity; here nothing does.
    """

    a: Structure
    count: int | None = None
    activation: Literal["silu", "relu", "gelu", "tanh"] = "relu"
    name: ClassVar[str] = "parallel"

    def check(self) -> None:
        self.need(count=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundParallel:
        self.required("count")
        branch = self.a.bind(in_shape, out_shape)
        branches = BoundSum(Sum((branch.structure,) * self.count), in_shape, out_shape, (branch,) * self.count)
        return BoundParallel(dataclasses.replace(self, a=branch.structure), in_shape, out_shape, branches)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundParallel(Bound):
    """Parallel with sizes; parameters nest under `0`, `1`, ... by branch."""

    branches: BoundSum

    exact: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    may_densify: ClassVar[bool] = False

    @property
    def is_complex(self) -> bool:
        return self.branches.is_complex

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return self.branches.leaves(in_axes, out_axes, gain)

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        return self.branches.init(key, dtype, gain)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        law = ACTIVATIONS[self.structure.activation]
        return sum(law(term.matmul(params[str(i)], x)) for i, term in enumerate(self.branches.terms))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """The output for one-hot inputs."""
        law = ACTIVATIONS[self.structure.activation]
        return sum(law(term.take(params[str(i)], ids)) for i, term in enumerate(self.branches.terms))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        self._refuse("transpose")

    def materialize(self, params: Params) -> jax.Array:
        self._refuse("dense form")

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        self._refuse("nearest member to a dense matrix")

    def _refuse(self, what: str) -> NoReturn:
        raise StructureError(f"{self.structure.short()} is not a matrix: it has no {what}")

    def _flops(self, rows: int) -> int:
        return self.branches._flops(rows)

    def _materialize_flops(self) -> int:
        return self.branches._materialize_flops()
