"""Permutation: one frozen index vector, square only; its product is one gather."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import check_gram, scale_columns, scale_rows, working_dtype
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Permutation(Structure):
    """`permutation()`: y[j] = x[index[j]], d_in = d_out; W[index[j], j] = 1. It does not train; init draws it."""

    name: ClassVar[str] = "permutation"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="permutation()",
        formula="W[p(j), j] = 1",
        params="0 (n indices)",
        flops="0",
        nearest="optimal (linear assignment), a full gram on one side at most",
        sharding="index over m, x is gathered",
        paper="Kuhn 1955",
        when="between block-structured factors; exact fast transforms",
    )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundPermutation:
        n, m = math.prod(in_shape), math.prod(out_shape)
        if n != m:
            raise StructureError(
                f"permutation: needs a square weight, got ({n}, {m}); put it beside one that changes the size, as in "
                f"permutation() @ dense()"
            )
        return BoundPermutation(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundPermutation(Bound):
    """Permutation with sizes. Leaf `index` (n,) int32, frozen.

    `materialize` and `take` give weakly typed floats, which take the dtype of what they are combined with.
    """

    grams: ClassVar[str] = "diagonal"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        axes = (first_axis(out_axes),)
        return {
            "index": Leaf((self.d_out,), axes, 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False)
        }

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        return jax.random.permutation(key, self.d_out).astype(jnp.int32)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return jnp.take(x, params["index"], axis=-1, unique_indices=True)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return jnp.zeros(y.shape, y.dtype).at[..., params["index"]].set(y, unique_indices=True)

    def materialize(self, params: Params) -> jax.Array:
        return self.take(params, jnp.arange(self.d_in))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.where(ids[..., None] == params["index"], 1.0, 0.0)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the linear assignment of least cost, by the Hungarian algorithm, O(n^3).

        |A^(1/2) (w - P) B^(1/2)|^2 is, up to a constant, the sum of A_ii B_jj - 2 (A w B)_ij over the ones of P, as
        long as one of the grams is diagonal or missing; for a complex w the real part counts.

        Raises:
          StructureError: both grams full, which is a quadratic assignment.
        """
        self.check_dense(w)
        for what, gram, size in (("in_gram", in_gram, self.d_in), ("out_gram", out_gram, self.d_out)):
            if gram is not None:
                check_gram(gram, size, what)
        grams = [g for g in (in_gram, out_gram) if g is not None]
        if len(grams) == 2 and grams[0].ndim == grams[1].ndim == 2:
            raise StructureError(
                "permutation: no closed form with a full in_gram and a full out_gram; pass the diagonal of one"
            )
        weighted = scale_columns(scale_rows(in_gram, jnp.real(w).astype(working_dtype(jnp.real(w)))), out_gram)
        squares = _diagonal(in_gram, self.d_in)[:, None] * _diagonal(out_gram, self.d_out)
        out, into = hungarian_algorithm((squares - 2 * weighted).T)
        return {"index": jnp.zeros(self.d_out, jnp.int32).at[out].set(into.astype(jnp.int32))}

    def _flops(self, rows: int) -> int:
        return 0


def _diagonal(gram: jax.Array | None, size: int) -> jax.Array:
    return jnp.ones(size) if gram is None else gram if gram.ndim == 1 else jnp.diagonal(gram)
