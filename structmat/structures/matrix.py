"""`Matrix`: a structure with its parameters, for people at a prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from structmat.structures.algebra import BoundSum, Sum
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Cost
from structmat.structures.recipe import Structure
from structmat.structures.text import parse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Matrix:
    """A pytree of parameters with a static Bound: `x @ W`, `W.T`, `W + V`, `W.materialize()`.

    Attributes:
      bound: the structure with sizes.
      params: its parameters, a nested dict of arrays.
    """

    bound: Bound = dataclasses.field(metadata={"static": True})
    params: dict[str, Any]

    __array_priority__ = 1000  # numpy arrays on the left defer to __rmatmul__

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.bound.d_in, self.bound.d_out

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the floating parameters."""
        return jnp.result_type(*(p for p in jax.tree.leaves(self.params) if not jnp.issubdtype(p.dtype, jnp.integer)))

    @property
    def structure(self) -> Structure:
        """The recipe, all arguments resolved."""
        return self.bound.structure

    @property
    def T(self) -> Matrix:
        """The transpose, over the same arrays."""
        return Matrix(self.bound.transpose(), self.params)

    @property
    def cost(self) -> Cost:
        """Cost of one product with a single row."""
        return self.bound.cost(1, self.dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.shape[0]:
            raise StructureError(f"cannot multiply an array of shape {x.shape} with a matrix of shape {self.shape}")
        return self.bound.matmul(self.params, x)

    def __add__(self, other: Matrix) -> Matrix:
        if not isinstance(other, Matrix):
            return NotImplemented
        if self.shape != other.shape:
            raise StructureError(f"cannot add matrices of shapes {self.shape} and {other.shape}")
        terms: list[Bound] = []
        params: list[dict[str, Any]] = []
        for m in (self, other):
            if isinstance(m.bound, BoundSum):
                terms += m.bound.terms
                params += [m.params[str(i)] for i in range(len(m.bound.terms))]
            else:
                terms.append(m.bound)
                params.append(m.params)
        structure = Sum.of(*(t.structure for t in terms))
        bound = BoundSum(structure, self.bound.in_shape, self.bound.out_shape, tuple(terms))
        return Matrix(bound, {str(i): p for i, p in enumerate(params)})

    def materialize(self) -> jax.Array:
        """The dense (d_in, d_out) array."""
        return self.bound.materialize(self.params)

    def error(self, dense: jax.Array) -> jax.Array:
        """Relative Frobenius error |dense - W| / |dense|."""
        self.bound.check_dense(dense)
        return jnp.linalg.norm(dense - self.materialize()) / jnp.linalg.norm(dense)

    def __repr__(self) -> str:
        share = self.cost.params / (self.shape[0] * self.shape[1])
        return f"Matrix({self.structure.short()}, shape={self.shape}, dtype={self.dtype}, params={share:.1%} of dense)"


def project(dense: jax.Array, structure: str | Structure, **kwargs: Any) -> Matrix:
    """The Matrix of a structure nearest to a dense `(d_in, d_out)` array; keywords as in `Bound.project`."""
    dense = jnp.asarray(dense)
    if dense.ndim != 2:
        raise StructureError(f"project needs a matrix, got an array of shape {dense.shape}")
    if not jnp.issubdtype(dense.dtype, jnp.inexact):
        dense = dense.astype(jnp.float32)
    bound = parse(structure).bind(*dense.shape)
    return Matrix(bound, bound.project(dense, **kwargs))


def random(
    structure: str | Structure, in_shape: int, out_shape: int, key: jax.Array, dtype: Any = jnp.float32
) -> Matrix:
    """A Matrix drawn from the structure's initialisation."""
    bound = parse(structure).bind(in_shape, out_shape)
    return Matrix(bound, bound.init(key, dtype))
