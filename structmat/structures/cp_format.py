"""CP tensors (Hitchcock 1927; Carroll and Chang 1970): sums of outer products of one vector per axis."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from structmat.structures.alternating import (
    append,
    best_of,
    draw,
    leading_vectors,
    norm,
    over_gram,
    replace_first,
    unfold,
)
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.linalg import balanced_split, jit_projection, working_dtype
from structmat.structures.tensor import Cores, TensorFormat


@dataclasses.dataclass(frozen=True)
class CPFormat(TensorFormat):
    """Entry [i_1, ..., i_N] is the sum over r of A_1[i_1, r] ... A_N[i_N, r]. Cores: A_k (n_k, R) per axis.

    Attributes:
      axes: the tensor's shape.
      rank: R, at most the product of all axes but the largest, with which every tensor can be written.
    """

    axes: Shape
    rank: int

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= largest_rank(self.axes):
            raise StructureError(
                f"cp: rank is {self.rank}, must be in 1..{largest_rank(self.axes)} for axes {self.axes}"
            )

    @staticmethod
    def of(axes: Sequence[int], rank: int) -> CPFormat:
        """The format, its rank as it stands."""
        return CPFormat(tuple(axes), rank)

    @staticmethod
    def of_fraction(axes: Sequence[int], fraction: float) -> CPFormat:
        """About `fraction` of the tensor's numbers: R = round(fraction n / sum n_k), within 1..largest."""
        if not fraction > 0:
            raise StructureError(f"of_fraction: fraction must be positive, got {fraction!r}")
        rank = round(fraction * math.prod(axes) / sum(axes))
        return CPFormat(tuple(axes), max(1, min(rank, largest_rank(tuple(axes)))))

    @property
    def shape(self) -> Shape:
        """The axes."""
        return self.axes

    @property
    def core_shapes(self) -> list[Shape]:
        """(n_k, R)."""
        return [(n, self.rank) for n in self.axes]

    @property
    def products(self) -> int:
        """R."""
        return self.rank

    def _names(self, tensor: str, free: str) -> list[str]:
        return [t + free[0] for t in tensor]

    @property
    def split(self) -> int:
        """How many axes make the rows of the matrix a tensor is handled as: the most even way to cut it in two."""
        halves = lambda k: math.prod(self.axes[:k]) + math.prod(self.axes[k:])
        return min(range(1, len(self.axes)), key=halves, default=1)

    def materialize(self, cores: Cores) -> jax.Array:
        """The tensor: one GEMM of the Khatri-Rao products of the two halves of the axes."""
        if len(cores) == 1:
            return cores[0].sum(axis=1)
        return (khatri_rao(cores[: self.split]) @ khatri_rao(cores[self.split :]).T).reshape(self.axes)

    def materialize_flops(self) -> int:
        """FLOPs of `materialize`."""
        if len(self.axes) == 1:
            return 0
        halves = self.axes[: self.split], self.axes[self.split :]
        return self.rank * (sum(map(khatri_rao_size, halves)) + 2 * math.prod(self.axes))

    def project(self, tensor: jax.Array, *, key: jax.Array | None = None, like: Cores | None = None) -> list[jax.Array]:
        """Alternating least squares from singular vectors, from random starts and from `like`; the best iterate.

        Monotone from every start, so never worse than `like`; for one or two axes the optimum by SVD. A best
        approximation need not exist for three axes and more (de Silva and Lim 2008): terms may then grow and cancel as
        far as the precision lets them. Terms come in descending size, shared evenly by the factors; the entry of largest
        modulus is positive in every column of all factors but the last.

        Args:
          key: of the random starts; a fixed one if left out.
        """
        key = jax.random.key(0) if key is None else key
        return _als(self, tensor, key, None if like is None else list(like))


def largest_rank(axes: Shape) -> int:
    """A rank at which every tensor can be written: the product of all axes but the largest."""
    return math.prod(axes) // max(axes)


def khatri_rao(factors: Cores) -> jax.Array:
    """(n_1, R), ..., (n_k, R) -> (n_1 ... n_k, R), column by column the outer product."""
    join = lambda a, b: (a[:, None, :] * b[None]).reshape(-1, a.shape[-1])
    return functools.reduce(join, factors)


def khatri_rao_size(axes: Shape) -> int:
    """Multiplications of `khatri_rao` per column."""
    return sum(math.prod(axes[:k]) for k in range(2, len(axes) + 1))


@jit_projection(0)
def _als(form: CPFormat, tensor: jax.Array, key: jax.Array, like: list[jax.Array] | None) -> list[jax.Array]:
    t = tensor.astype(working_dtype(tensor))
    if len(form.axes) == 1:
        return [tensor[:, None]]
    half = form.split
    w = t.reshape(math.prod(form.axes[:half]), -1)
    if len(form.axes) == 2:
        a, b = balanced_split(w, form.rank)
        return [a.astype(tensor.dtype), b.T.astype(tensor.dtype)]

    def sweep(factors: Cores) -> list[jax.Array]:
        """Both halves share one product of the tensor with the other half's Khatri-Rao product."""
        left, right = list(factors[:half]), list(factors[half:])
        left = _update(left, w @ khatri_rao(right).conj(), _gram(right))
        right = _update(right, w.T @ khatri_rao(left).conj(), _gram(left))
        return _normalize([*left, *right])

    error = lambda factors: norm(t - form.materialize(factors))
    starts = _starts(form, t, key)
    if like is not None:
        starts = append(starts, _normalize(like))
    return [f.astype(tensor.dtype) for f in _arrange(best_of(starts, sweep, error, t))]


def _gram(factors: Cores) -> jax.Array:
    """Gram matrix (R, R) of the columns of the Khatri-Rao product, conjugated."""
    return functools.reduce(jnp.multiply, [f.T @ f.conj() for f in factors])


def _update(factors: list[jax.Array], product: jax.Array, gram: jax.Array) -> list[jax.Array]:
    """Exact least squares for each factor of one half in turn, given the tensor's product with the other half."""
    rank = product.shape[-1]
    product = product.reshape(*(f.shape[0] for f in factors), rank)
    for k, f in enumerate(factors):
        others = [g for j, g in enumerate(factors) if j != k]
        rows, here = jnp.moveaxis(product, k, 0).reshape(f.shape[0], -1, rank), gram
        if others:
            rows, here = rows * khatri_rao(others).conj(), gram * _gram(others)
        factors[k] = over_gram(rows.sum(axis=1), here)
    return factors


def _normalize(factors: Cores) -> list[jax.Array]:
    """Every term's size shared evenly by its columns; a term of which one column vanishes is zero."""
    sizes = jnp.stack([jnp.linalg.norm(f, axis=0) for f in factors])
    alive = jnp.all(sizes > 0, axis=0)
    each = jnp.exp(jnp.mean(jnp.log(jnp.where(sizes > 0, sizes, 1)), axis=0))
    return [jnp.where(alive, f * (each / jnp.where(s > 0, s, 1)), 0) for f, s in zip(factors, sizes)]


def _arrange(factors: Cores) -> list[jax.Array]:
    """Terms in descending size, signs fixed."""
    factors = _normalize(factors)
    order = jnp.argsort(-jnp.linalg.norm(factors[0], axis=0))
    *factors, last = (f[:, order] for f in factors)
    fixed = []
    for f in factors:
        peak = jnp.take_along_axis(f, jnp.argmax(jnp.abs(f), axis=0)[None], axis=0)
        sign = jnp.where(peak == 0, 1, peak / jnp.where(peak == 0, 1, jnp.abs(peak)))
        fixed.append(f / sign)
        last = last * sign
    return [*fixed, last]


def _starts(form: CPFormat, t: jax.Array, key: jax.Array) -> list[jax.Array]:
    """Leading singular vectors of the unfoldings, filled up with random columns; then random factors of unit columns."""
    factors = [f / jnp.linalg.norm(f, axis=1, keepdims=True) for f in draw(key, form.core_shapes, t)]
    first = []
    for k, f in enumerate(factors):
        vectors = leading_vectors(unfold(t, k), min(form.rank, form.axes[k]))
        first.append(jnp.concatenate([vectors, f[0, :, vectors.shape[1] :]], axis=1))
    return replace_first(factors, first)
