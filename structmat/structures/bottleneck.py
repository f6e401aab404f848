"""Two structures with a nonlinearity between them: what CoLA, LOST and Sparse-IFT put where a matrix was.

Not a matrix: it multiplies, initialises, shards and counts like one, and refuses to be materialised or projected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NoReturn

import jax

from structmat.structures.algebra import BoundProduct
from structmat.structures.composite import Composite
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Params, Shape
from structmat.structures.recipe import Structure

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jax.numpy.tanh,
}


@dataclasses.dataclass(frozen=True, repr=False)
class Bottleneck(Composite):
    """`bottleneck(a, b, inner, activation='silu')`: y = activation(x A) B, A (d_in, inner) and B (inner, d_out).

    `bottleneck(dense(), dense(), inner=64)` is CoLA's layer (Liu et al. 2025); with sparse factors and 'relu' it is
    Sparse-IFT's factorised one (Thangarasa et al. 2024). `fit(bottleneck(dense(), dense()), params=0.5)` finds `inner`.
    """

    a: Structure
    b: Structure
    inner: int | None = None
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    name: ClassVar[str] = "bottleneck"

    def check(self) -> None:
        self.need(inner=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBottleneck:
        self.required("inner")
        a, b = self.a.bind(in_shape, (self.inner,)), self.b.bind((self.inner,), out_shape)
        own = dataclasses.replace(self, a=a.structure, b=b.structure)
        return BoundBottleneck(own, in_shape, out_shape, a, b)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.inner is not None:
            return []
        found = []
        for inner in range(1, max(math.prod(in_shape), math.prod(out_shape)) + 1):
            own = dataclasses.replace(self, inner=inner)
            try:
                own.bind(in_shape, out_shape)
            except StructureError:
                continue
            found.append(own)
        return found


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBottleneck(BoundProduct):
    """Bottleneck with sizes; parameters nest under `0` (a) and `1` (b)."""

    is_linear: ClassVar[bool] = False
    may_densify: ClassVar[bool] = False

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        hidden = ACTIVATIONS[self.structure.activation](self.a.matmul(params["0"], x))
        return self.b.matmul(params["1"], hidden)

    def _refuse(self, what: str) -> NoReturn:
        raise StructureError(f"{self.structure.short()} is not a matrix: it has no {what}")

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        self._refuse("transpose")

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """The output for one-hot inputs."""
        hidden = ACTIVATIONS[self.structure.activation](self.a.take(params["0"], ids))
        return self.b.matmul(params["1"], hidden)

    def materialize(self, params: Params) -> jax.Array:
        self._refuse("dense form")

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        self._refuse("nearest member to a dense matrix")
