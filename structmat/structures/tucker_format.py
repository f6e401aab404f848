"""Tucker tensors (Tucker 1966; De Lathauwer et al. 2000): a small core with one factor per axis."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp

from structmat.structures.alternating import append, best_of, leading_vectors, norm, unfold
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.linalg import jit_projection, working_dtype
from structmat.structures.tensor import Cores, TensorFormat, proportion


@dataclasses.dataclass(frozen=True)
class TuckerFormat(TensorFormat):
    """Entry [i_1, ..., i_N] is core x_1 U_1[i_1] ... x_N U_N[i_N]. Cores: the core, then U_k (n_k, r_k) per axis.

    Attributes:
      axes: the tensor's shape.
      ranks: the core's shape. A rank above its axis, or above the product of the others, would hold nothing more.
    """

    axes: Shape
    ranks: Shape

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.axes):
            raise StructureError(f"tucker: {len(self.ranks)} ranks {self.ranks} for {len(self.axes)} axes {self.axes}")
        valid = useful_ranks(self.axes, tuple(max(1, r) for r in self.ranks))
        if self.ranks != valid:
            raise StructureError(
                f"tucker: ranks {self.ranks} do not fit axes {self.axes}: each is at least 1, at most its axis and at most "
                f"the product of the others; nearest valid: {valid}"
            )

    @staticmethod
    def of(axes: Sequence[int], rank: int | Shape) -> TuckerFormat:
        """An int is min(rank, n_k, product of the other axes) on axis k; a tuple is taken as it stands."""
        axes = tuple(axes)
        return TuckerFormat(axes, useful_ranks(axes, (rank,) * len(axes)) if isinstance(rank, int) else tuple(rank))

    @staticmethod
    def of_fraction(axes: Sequence[int], fraction: float) -> TuckerFormat:
        """About `fraction` of the tensor's numbers: r_k = round(c n_k), c solving n c^N + c sum n_k^2 = fraction n."""
        n, squares = math.prod(axes), sum(k * k for k in axes)
        c = proportion(lambda c: n * c ** len(axes) + c * squares, fraction, n)
        return TuckerFormat(tuple(axes), useful_ranks(tuple(axes), tuple(max(1, round(c * k)) for k in axes)))

    @property
    def shape(self) -> Shape:
        """The axes."""
        return self.axes

    @property
    def core_shapes(self) -> list[Shape]:
        """ranks, then (n_k, r_k)."""
        return [self.ranks, *zip(self.axes, self.ranks)]

    @property
    def products(self) -> int:
        """prod(ranks)."""
        return math.prod(self.ranks)

    def _names(self, tensor: str, free: str) -> list[str]:
        return [free[: len(tensor)], *(t + f for t, f in zip(tensor, free))]

    def _growth(self) -> list[int]:
        """Axes in the order in which expanding the core is cheapest."""
        return cheapest_order(self.axes, self.ranks)[::-1]

    def materialize(self, cores: Cores) -> jax.Array:
        """The tensor: one GEMM per axis, in the cheapest order."""
        state, order = cores[0], self._growth()
        for done, k in enumerate(order):
            at = k - sum(j < k for j in order[:done])  # finished axes move to the end
            state = jnp.tensordot(state, cores[1 + k], ((at,), (1,)))
        return state.transpose([order.index(k) for k in range(len(order))])

    def materialize_flops(self) -> int:
        """FLOPs of `materialize`."""
        return reduction_flops(self.axes, self.ranks)

    def project(self, tensor: jax.Array, *, like: Cores | None = None) -> list[jax.Array]:
        """HOSVD, then higher-order orthogonal iteration: monotone, the best iterate; never worse than `like`'s factors.

        The optimum for up to two axes; for N axes HOSVD alone is within sqrt(N) of it. U_k is orthonormal, the core
        carries the size.
        """
        return _hooi(self, tensor, None if like is None else list(like))


def useful_ranks(axes: Shape, ranks: Shape) -> Shape:
    """The ranks lowered to their axis and to the product of the others, which hold the same tensors."""
    ranks = tuple(map(min, ranks, axes))
    while True:
        lower = list(ranks)
        for k in range(len(lower)):
            lower[k] = min(lower[k], math.prod(lower[:k]) * math.prod(lower[k + 1 :]))
        if tuple(lower) == ranks:
            return ranks
        ranks = tuple(lower)


def proportional_ranks(axes: Shape) -> list[Shape]:
    """All ranks round(c n_k) for c from 0 to 1, at least 1 and no more than useful, ascending."""
    steps = sorted((Fraction(2 * r - 1, 2 * n), k) for k, n in enumerate(axes) for r in range(2, n + 1))
    ranks, found = [1] * len(axes), [(1,) * len(axes)]
    for at, (c, k) in enumerate(steps):
        ranks[k] += 1
        if at + 1 == len(steps) or steps[at + 1][0] > c:
            useful = useful_ranks(axes, tuple(ranks))
            if useful != found[-1]:
                found.append(useful)
    return found


def cheapest_order(axes: Shape, ranks: Shape) -> list[int]:
    """The order in which to contract axes n_k down to r_k with the fewest operations: ascending n r / (n - r).

    Swapping two neighbours shows it; expanding r_k to n_k is cheapest in the reverse order.
    """
    weight = lambda k: math.inf if ranks[k] == axes[k] else axes[k] * ranks[k] / (axes[k] - ranks[k])
    return sorted(range(len(axes)), key=weight)


def reduction_flops(axes: Shape, ranks: Shape) -> int:
    """FLOPs of contracting all axes to their ranks, or of expanding the ranks to the axes."""
    total, size = 0, math.prod(axes)
    for k in cheapest_order(axes, ranks):
        total += 2 * size * ranks[k]
        size = size // axes[k] * ranks[k]
    return total


@jit_projection(0)
def _hooi(form: TuckerFormat, tensor: jax.Array, like: list[jax.Array] | None) -> list[jax.Array]:
    t = tensor.astype(working_dtype(tensor))
    order = range(len(form.axes))
    letters = string.ascii_letters

    def onto(factors: Cores, skip: int = -1) -> jax.Array:
        """The tensor in the coordinates of the factors' columns, axis `skip` as it is."""
        names = [letters[k] + letters[k].upper() for k in order if k != skip]
        out = "".join(letters[k] if k == skip else letters[k].upper() for k in order)
        basis = [factors[k].conj() for k in order if k != skip]
        return jnp.einsum(",".join([letters[: len(order)], *names]) + "->" + out, t, *basis, optimize="auto-hq")

    def sweep(factors: Cores) -> list[jax.Array]:
        factors = list(factors)
        for k in order:
            factors[k] = leading_vectors(unfold(onto(factors, skip=k), k), form.ranks[k])
        return factors

    error = lambda factors: norm(t - form.materialize([onto(factors), *factors]))
    factors = [leading_vectors(unfold(t, k), form.ranks[k]) for k in order]
    if len(form.axes) > 2:
        starts = [f[None] for f in factors]
        if like is not None:
            starts = append(starts, [jnp.linalg.qr(f.astype(t.dtype))[0] for f in like[1:]])
        factors = best_of(starts, sweep, error, t)
    return [c.astype(tensor.dtype) for c in (onto(factors), *factors)]
