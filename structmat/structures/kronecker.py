"""Sums of Kronecker products (Van Loan and Pitsianis 1993; Edalati et al. 2022): W = sum_t A_t kron B_t."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.kronecker import kronecker
from pallas_kernels.kronecker.xla import a_first
from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.factors import divisors, need_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import balanced_split
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Kronecker(Structure):
    """`kronecker(terms=1, in_factors=None, out_factors=None)`: A_t (n1, m1), B_t (n2, m2), d_in = n1 n2, d_out = m1 m2.

    Parameters terms (n1 m1 + n2 m2). `terms` left out is one term, or what `fit` chooses. Factors left out are the
    most even pairs of factors >= 2, the input's descending and the output's ascending, which balances A and B; a given
    pair may hold a 1 (A over a vocabulary, B over nothing).
    """

    terms: int | None = None
    in_factors: tuple[int, ...] | None = None
    out_factors: tuple[int, ...] | None = None
    name: ClassVar[str] = "kronecker"
    about: ClassVar[About] = About(
        example="kronecker(terms=2)",
        formula="Σₜ Aₜ ⊗ Bₜ, n = n₁ n₂, m = m₁ m₂",
        params="t (n₁ m₁ + n₂ m₂)",
        flops="2 t × the cheaper order",
        nearest="optimal (Van Loan-Pitsianis)",
        sharding="A over n and m, B whole",
        paper="Van Loan and Pitsianis 1993; Edalati et al. 2022",
        when="extreme compression; shares parameters",
        kernel="kronecker",
    )

    def check(self) -> None:
        self.need(terms=1)
        for what in ("in_factors", "out_factors"):
            pair = getattr(self, what)
            if pair is not None and (len(pair) != 2 or min(pair) < 1):
                raise StructureError(f"kronecker: {what} must be two positive ints, got {pair}")

    def _resolve(self, in_shape: Shape, out_shape: Shape) -> Kronecker:
        rows = self._pair("in_factors", math.prod(in_shape), "d_in")
        columns = self._pair("out_factors", math.prod(out_shape), "d_out")
        return dataclasses.replace(self, in_factors=rows, out_factors=columns)

    def _pair(self, argument: str, size: int, what: str) -> Shape:
        pair = getattr(self, argument)
        if pair is None:
            even = need_factors(size, 2, self.name, what)
            return even if argument == "in_factors" else even[::-1]
        if pair[0] * pair[1] != size:
            valid = min(divisors(size), key=lambda d: (abs(d - pair[0]), d))
            raise StructureError(
                f"kronecker: {argument}={pair} multiply to {pair[0] * pair[1]}, not {what}={size}; "
                f"nearest valid: ({valid}, {size // valid})"
            )
        return pair

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundKronecker:
        full = self._resolve(in_shape, out_shape)
        full = dataclasses.replace(full, terms=full.terms or 1)
        full.choose("terms", range(1, full._most() + 1), in_shape, out_shape)
        return BoundKronecker(full, in_shape, out_shape)

    def _most(self) -> int:
        (n1, n2), (m1, m2) = self.in_factors, self.out_factors
        return min(n1 * m1, n2 * m2)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.terms is not None:
            return []
        full = self._resolve(in_shape, out_shape)
        return [dataclasses.replace(full, terms=t) for t in range(1, full._most() + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundKronecker(Bound):
    """Kronecker with sizes. Leaves `a` (terms, n1, m1), `b` (terms, n2, m2)."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(terms, n1, n2, m1, m2)."""
        return (self.structure.terms, *self.structure.in_factors, *self.structure.out_factors)

    @property
    def a_first(self) -> bool:
        """Whether applying A before B is the cheaper order."""
        _, n1, n2, m1, m2 = self.sizes
        return a_first(n1, n2, m1, m2)

    @property
    def last(self) -> str:
        """The factor applied last."""
        return "b" if self.a_first else "a"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        t, n1, n2, m1, m2 = self.sizes
        ta, tb = (1, t) if self.a_first else (t, 1)
        axes = ("terms", first_axis(in_axes), first_axis(out_axes))
        return {
            "a": self.factor((t, n1, m1), axes, ta * n1, tb * m1, share=2, embed_fan=ta),
            "b": self.factor((t, n2, m2), ("terms", None, None), tb * n2, ta * m2, share=2, embed_fan=tb),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return kronecker(x, params["a"], params["b"])

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        """By the transposed factors, which kernels take as well as the others."""
        return kronecker(y, params["a"].mT, params["b"].mT)

    def materialize(self, params: Params) -> jax.Array:
        return jnp.einsum("tia,tjb->ijab", params["a"], params["b"]).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        n2 = self.sizes[2]
        a, b = params["a"][:, ids // n2], params["b"][:, ids % n2]
        return jnp.einsum("t...a,t...b->...ab", a, b).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum for any number of terms: truncated SVD of the rearranged matrix (n1 m1, n2 m2), whose
        rank-one terms are the Kronecker products (the rearrangement keeps the norm); sqrt(sigma) in each factor."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        t, n1, n2, m1, m2 = self.sizes
        paired = w.reshape(n1, n2, m1, m2).transpose(0, 2, 1, 3).reshape(n1 * m1, n2 * m2)
        a, b = balanced_split(paired, t)
        return {"a": a.T.reshape(t, n1, m1).astype(w.dtype), "b": b.reshape(t, n2, m2).astype(w.dtype)}

    def _flops(self, rows: int) -> int:
        t, n1, n2, m1, m2 = self.sizes
        return 2 * rows * t * min(n2 * m1 * (n1 + m2), n1 * m2 * (n2 + m1))

    def _materialize_flops(self) -> int:
        return 2 * self.structure.terms * self.d_in * self.d_out
