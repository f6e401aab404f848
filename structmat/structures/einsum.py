"""Every two-factor matrix that is one Einstein summation (Potapczynski, Qiu et al. 2024, arXiv 2410.02117).

With d_in = alpha beta gamma and d_out = delta epsilon phi, in index (g, b, a) and out index (f, e, d), a and d fastest,

    W[g, b, a, f, e, d] = sum_r A[g, a, f, d, r] B[f, g, b, r, e].

A is used beta times and B delta times in a product; each slice (f, g) of W, arranged as a matrix with rows (a, d) and
columns (b, e), has rank <= r. Special points: block low rank (beta = delta = 1), low rank (alpha = d_in,
epsilon = d_out), Kronecker and tensor train (gamma = phi = 1).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import balanced_split, diagonal_roots
from structmat.structures.recipe import Structure

GENERIC = (0.5, 0.25, 0.25, 0.25, 0.5, 0.25)
"""The paper's point inside the cube, which no other family covers."""


@dataclasses.dataclass(frozen=True, repr=False)
class Einsum(Structure):
    """`einsum(in_factors, out_factors, rank)` or `einsum(theta)`: factors (alpha, beta, gamma) and (delta, epsilon, phi).

    `theta` = (a, b, g, d, e, f, r) gives exponents instead: alpha = d_in^a and so on, rank = min(d_in, d_out)^r; the
    first three and the next three sum to 1. Binding resolves it to the exact factors nearest in their logarithms (an
    exponent of 0 is a factor of 1; nothing is padded) and to the nearest rank there is. Without r, `rank` is given or
    chosen by `fit`. With nothing given, `fit` chooses the rank at theta = (0.5, 0.25, 0.25, 0.25, 0.5, 0.25).
    """

    in_factors: tuple[int, ...] | None = None
    out_factors: tuple[int, ...] | None = None
    rank: int | None = None
    theta: tuple[float, ...] | None = None
    name: ClassVar[str] = "einsum"
    about: ClassVar[About] = About(
        example="einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.0))",
        formula="Σᵣ A[g,a,f,d,r] B[f,g,b,r,e]",
        params="φγρ (αδ + βε)",
        flops="2 φγρ δβ (α + ε)",
        nearest="optimal (slice SVD); diagonal grams unless α, β > 1 or δ, ε > 1",
        sharding="γ or the slowest in digit, φ or the slowest out digit",
        paper="Potapczynski et al. 2024",
        when="between block low rank, Kronecker and low rank",
    )

    def check(self) -> None:
        self.need(rank=1)
        for what in ("in_factors", "out_factors"):
            factors = getattr(self, what)
            if factors is not None and (len(factors) != 3 or min(factors) < 1):
                raise StructureError(f"einsum: {what} must be three positive ints, got {factors}")
        if self.theta is not None:
            self._check_theta()

    def _check_theta(self) -> None:
        theta = self.theta
        if self.in_factors is not None or self.out_factors is not None:
            raise StructureError("einsum: give theta, or in_factors and out_factors, not both")
        if len(theta) not in (6, 7) or not all(0 <= t <= 1 for t in theta):
            raise StructureError(f"einsum: theta must be 6 or 7 numbers in [0, 1], got {theta}")
        if len(theta) == 7 and self.rank is not None:
            raise StructureError(f"einsum: the seventh number of theta is the rank's; leave out it or rank={self.rank}")
        for what, part in (("in", theta[:3]), ("out", theta[3:6])):
            if abs(sum(part) - 1) > 0.02:
                raise StructureError(f"einsum: the {what} exponents of theta must sum to 1, got {part}")

    def _factored(self, in_shape: Shape, out_shape: Shape) -> Einsum:
        """With factors in the place of theta, and the rank where theta gives it."""
        n, m = math.prod(in_shape), math.prod(out_shape)
        if self.theta is None:
            self.required("in_factors", "out_factors")
            for what, size in (("in_factors", n), ("out_factors", m)):
                if math.prod(getattr(self, what)) != size:
                    self._refuse(what, size)
            return self
        ins, outs = nearest_factors(n, self.theta[:3]), nearest_factors(m, self.theta[3:6])
        full = dataclasses.replace(self, in_factors=ins, out_factors=outs, theta=None)
        if len(self.theta) == 6:
            return full
        return dataclasses.replace(full, rank=min(max(1, round(min(n, m) ** self.theta[6])), full._most()))

    def _refuse(self, what: str, size: int) -> None:
        given = getattr(self, what)
        product = math.prod(given)
        near = nearest_factors(size, tuple(math.log(v) / math.log(product) if product > 1 else 1 / 3 for v in given))
        raise StructureError(f"einsum: {what}={given} multiply to {product}, not {size}; nearest valid: {near}")

    def _most(self) -> int:
        """Rank at which a slice is any matrix."""
        (alpha, beta, _), (delta, epsilon, _) = self.in_factors, self.out_factors
        return min(alpha * delta, beta * epsilon)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundEinsum:
        full = self._factored(in_shape, out_shape)
        full.required("rank")
        full.choose("rank", range(1, full._most() + 1), in_shape, out_shape)
        return BoundEinsum(full, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        bare = self.theta is None and self.in_factors is None and self.out_factors is None
        start = dataclasses.replace(self, theta=GENERIC) if bare else self
        full = start._factored(in_shape, out_shape)
        if full.rank is not None:
            return []
        return [dataclasses.replace(full, rank=r) for r in range(1, full._most() + 1)]


@functools.lru_cache(maxsize=4096)
def nearest_factors(size: int, exponents: tuple[float, ...]) -> Shape:
    """Three factors of `size` whose logarithms are nearest to exponents * log(size).

    An exponent of 0 gives a 1: moving the factor to the side most below its goal is nearer. Ties go to the smallest
    third factor, then to the largest first one.
    """
    goal = [t * math.log(size) for t in exponents]
    splits = [(p, q, size // p // q) for p in divisors(size) for q in divisors(size // p)]
    far = lambda s: sum((math.log(v) - g) ** 2 for v, g in zip(s, goal))
    return min(splits, key=lambda s: (round(far(s), 9), s[2], -s[0]))


@dataclasses.dataclass(frozen=True, repr=False)
class BoundEinsum(Bound):
    """Einsum with sizes. Leaves `A` (gamma, alpha, phi, delta, r) and `B` (phi, gamma, beta, r, epsilon)."""

    last: ClassVar[str] = "B"

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """(alpha, beta, gamma, delta, epsilon, phi, rank)."""
        return (*self.structure.in_factors, *self.structure.out_factors, self.structure.rank)

    @property
    def grams(self) -> str:
        """A diagonal gram keeps a slice's rank structure when it does not mix a with b, or d with e."""
        alpha, beta, _, delta, epsilon, _, _ = self.sizes
        return "diagonal" if min(alpha, beta) == min(delta, epsilon) == 1 else "none"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        alpha, beta, gamma, delta, epsilon, phi, r = self.sizes
        i, o = first_axis(in_axes), first_axis(out_axes)
        g, b, a = _slowest(i, gamma, beta, alpha)
        f, e, d = _slowest(o, phi, epsilon, delta)
        return {
            "A": self.factor((gamma, alpha, phi, delta, r), (g, a, f, d, "rank"), alpha, delta * phi * r, share=2),
            "B": self.factor(
                (phi, gamma, beta, r, epsilon), (f, g, b, "rank", e), beta * gamma * r, epsilon, share=2, embed_fan=r
            ),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        alpha, beta, gamma, delta, epsilon, phi, r = self.sizes
        grouped = x.reshape(-1, gamma, beta * alpha).swapaxes(0, 1).reshape(gamma, -1, alpha)
        a = params["A"].reshape(gamma, alpha, phi * delta * r)
        z = lax.dot_general(grouped, a, (((2,), (1,)), ((0,), (0,))))
        z = z.reshape(gamma, -1, beta, phi, delta, r).transpose(3, 1, 4, 0, 2, 5)
        b = params["B"].reshape(phi, gamma * beta * r, epsilon)
        y = lax.dot_general(z.reshape(phi, -1, gamma * beta * r), b, (((2,), (1,)), ((0,), (0,))))
        return y.reshape(phi, -1, delta, epsilon).transpose(1, 0, 3, 2).reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        return jnp.einsum("gafdr,fgbre->gbafed", params["A"], params["B"]).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        alpha, beta, gamma, _, _, _, _ = self.sizes
        g, b, a = jnp.unravel_index(ids, (gamma, beta, alpha))
        rows = jnp.einsum("...fdr,...fre->...fed", params["A"][g, a], params["B"].transpose(1, 2, 0, 3, 4)[g, b])
        return rows.reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum at every point: the slices (f, g), arranged as (a d, b e), partition the entries of w and are
        free matrices of rank r, so one batched truncated SVD solves it; sqrt(sigma) in each factor.

        A diagonal in_gram keeps that form where alpha or beta is 1, a diagonal out_gram where delta or epsilon is 1;
        elsewhere the weights of a slice are no product of row and column weights.

        Raises:
          StructureError: wrong shape, a full gram, or a diagonal one where both factors of its side exceed 1.
        """
        self.check_dense(w)
        alpha, beta, gamma, delta, epsilon, phi, r = self.sizes
        t = w.reshape(gamma, beta, alpha, phi, epsilon, delta)
        if in_gram is not None:
            root, in_inverse = self._roots(in_gram, "in_gram", (gamma, beta, alpha))
            t = t * root.reshape(gamma, beta, alpha, 1, 1, 1)
        if out_gram is not None:
            root, out_inverse = self._roots(out_gram, "out_gram", (phi, epsilon, delta))
            t = t * root.reshape(phi, epsilon, delta)
        t = t.transpose(3, 0, 2, 5, 1, 4).reshape(phi, gamma, alpha * delta, beta * epsilon)
        left, right = balanced_split(t, r)
        a = left.reshape(phi, gamma, alpha, delta, r).transpose(1, 2, 0, 3, 4)
        b = right.reshape(phi, gamma, r, beta, epsilon).transpose(0, 1, 3, 2, 4)
        if in_gram is not None and beta == 1:
            a = a * in_inverse.reshape(gamma, alpha, 1, 1, 1)
        elif in_gram is not None:
            b = b * in_inverse.reshape(gamma, beta, 1, 1)
        if out_gram is not None and epsilon == 1:
            a = a * out_inverse.reshape(phi, delta, 1)
        elif out_gram is not None:
            b = b * out_inverse.reshape(phi, 1, 1, 1, epsilon)
        return {"A": a.astype(w.dtype), "B": b.astype(w.dtype)}

    def _roots(self, gram: jax.Array, what: str, digits: Shape) -> tuple[jax.Array, jax.Array]:
        if min(digits[1:]) > 1:
            raise StructureError(
                f"einsum: no closed form with {what} where both factors of a side's slices, here {digits[1:]}, exceed 1"
            )
        return diagonal_roots(gram, math.prod(digits), what, self.structure.name)

    def _flops(self, rows: int) -> int:
        alpha, beta, gamma, delta, epsilon, phi, r = self.sizes
        return 2 * rows * phi * delta * r * gamma * beta * (alpha + epsilon)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.d_out * self.structure.rank


def _slowest(axis: str | None, *factors: int) -> list[str | None]:
    """`axis` at the first factor above 1, where a mesh splits the index into contiguous runs; None elsewhere."""
    at = next((k for k, v in enumerate(factors) if v > 1), 0)
    return [axis if k == at else None for k in range(len(factors))]
