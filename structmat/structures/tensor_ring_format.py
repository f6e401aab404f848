"""Tensor rings (Zhao et al. 2016): tensor trains whose ends are joined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from structmat.structures.alternating import append, best_of, draw, even_norms, least_squares, norm, replace_first
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.linalg import jit_projection, truncated_svd, working_dtype
from structmat.structures.tensor import Cores, TensorFormat, maximal_ranks, proportion


@dataclasses.dataclass(frozen=True)
class TensorRingFormat(TensorFormat):
    """Entry [i_1, ..., i_c] is the trace of the product of the matrices core_k[:, i_k, :].

    Attributes:
      modes: for every core the tensor axes it carries, as in TensorTrainFormat.
      ranks: ranks[k] joins core k - 1 to core k; ranks[0] joins the last core to the first.
    """

    modes: tuple[Shape, ...]
    ranks: Shape

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.modes):
            raise StructureError(f"a tensor ring of {len(self.modes)} cores has as many ranks, got {self.ranks}")
        sizes = [math.prod(m) for m in self.modes]
        for k, rank in enumerate(self.ranks):
            left, right = self.ranks[k - 1] * sizes[k - 1], self.ranks[(k + 1) % len(sizes)] * sizes[k]
            most = min(left, right) if len(sizes) > 1 else 1
            if not 1 <= rank <= most:
                raise StructureError(f"tensor ring: rank {k} is {rank}, must be in 1..{most} for modes {self.modes}")

    @staticmethod
    def of(modes: Sequence[int | Shape], rank: int) -> TensorRingFormat:
        """All ranks equal (1 for a single core); a mode may be an int."""
        modes = tuple((m,) if isinstance(m, int) else tuple(m) for m in modes)
        return TensorRingFormat(modes, (rank if len(modes) > 1 else 1,) * len(modes))

    @staticmethod
    def of_fraction(modes: Sequence[int | Shape], fraction: float) -> TensorRingFormat:
        """About `fraction` of the tensor's numbers: one rank, solving rank^2 sum n_k = fraction n, within 1..enough."""
        modes = tuple((m,) if isinstance(m, int) else tuple(m) for m in modes)
        sizes, most = [math.prod(m) for m in modes], enough_rank(modes)
        c = proportion(lambda c: (c * most) ** 2 * sum(sizes), fraction, math.prod(sizes))
        return TensorRingFormat.of(modes, max(1, round(c * most)))

    @property
    def shape(self) -> Shape:
        """The tensor's axes, core by core."""
        return tuple(n for mode in self.modes for n in mode)

    @property
    def core_shapes(self) -> list[Shape]:
        """(r_k, *modes[k], r_{k+1}) per core, cyclically."""
        right = (*self.ranks[1:], self.ranks[0])
        return [(r, *mode, s) for r, mode, s in zip(self.ranks, self.modes, right)]

    @property
    def products(self) -> int:
        """prod(ranks)."""
        return math.prod(self.ranks)

    def _names(self, tensor: str, free: str) -> list[str]:
        names, at, count = [], 0, len(self.modes)
        for k, mode in enumerate(self.modes):
            names.append(free[k] + tensor[at : at + len(mode)] + free[(k + 1) % count])
            at += len(mode)
        return names

    def _halves(self) -> tuple[int, int]:
        """(number of cores in the first half, FLOPs) of the cheapest way to multiply the ring out as two chains."""
        sizes = [math.prod(m) for m in self.modes]

        def flops(k: int) -> int:
            join = 2 * math.prod(sizes) * self.ranks[0] * self.ranks[k]
            return join + sum(_chain_flops(self.core_shapes[part]) for part in (slice(0, k), slice(k, None)))

        return min(((k, flops(k)) for k in range(1, len(sizes))), key=lambda pair: pair[1], default=(0, 0))

    def materialize(self, cores: Cores) -> jax.Array:
        """The tensor: two chains of GEMMs and one that joins them at both ends."""
        at = self._halves()[0]
        if at == 0:
            return cores[0].reshape(self.shape)
        first, second = _chain(cores[:at]), _chain(cores[at:])
        joined = self.ranks[0] * self.ranks[at]
        left = first.transpose(1, 0, 2).reshape(-1, joined)
        return (left @ second.transpose(2, 0, 1).reshape(joined, -1)).reshape(self.shape)

    def materialize_flops(self) -> int:
        """FLOPs of `materialize`."""
        return self._halves()[1]

    def project(self, tensor: jax.Array, *, key: jax.Array | None = None, like: Cores | None = None) -> list[jax.Array]:
        """Alternating least squares from the TR-SVD, from random starts and from `like`; the best iterate.

        Monotone from every start, so no worse than the TR-SVD (Zhao et al. 2016, Algorithm 1) nor than `like`; for two
        cores the optimum, an SVD of rank ranks[0] ranks[1]. All cores have the same norm. Local minima are many: another `key` may find a
        better one.

        Args:
          key: of the random starts; a fixed one if left out.
        """
        key = jax.random.key(0) if key is None else key
        return _als(self, tensor, key, None if like is None else list(like))


def enough_rank(modes: Sequence[Shape]) -> int:
    """An equal rank at which a tensor ring of these modes holds every tensor: the largest tensor train rank, or its root
    for two cores, which are joined twice."""
    if len(modes) == 1:
        return 1
    most = max(maximal_ranks(modes))
    return math.isqrt(most - 1) + 1 if len(modes) == 2 else most


def _chain(cores: Cores) -> jax.Array:
    """Cores (r_k, *mode, r_{k+1}) multiplied from the left: (r_first, all modes, r_last)."""
    left = cores[0].shape[0]
    state = cores[0].reshape(-1, cores[0].shape[-1])
    for core in cores[1:]:
        state = (state @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return state.reshape(left, -1, cores[-1].shape[-1])


def _chain_flops(shapes: Sequence[Shape]) -> int:
    """FLOPs of `_chain`."""
    rows, total = math.prod(shapes[0][:-1]), 0
    for shape in shapes[1:]:
        total += 2 * rows * math.prod(shape)
        rows *= math.prod(shape[1:-1])
    return total


@jit_projection(0)
def _als(form: TensorRingFormat, tensor: jax.Array, key: jax.Array, like: list[jax.Array] | None) -> list[jax.Array]:
    sizes = [math.prod(m) for m in form.modes]
    t = tensor.astype(working_dtype(tensor)).reshape(sizes)
    count = len(sizes)
    shapes = [(s[0], n, s[-1]) for s, n in zip(form.core_shapes, sizes)]
    done = lambda cores: [c.reshape(s).astype(tensor.dtype) for c, s in zip(even_norms(cores), form.core_shapes)]
    if count == 1:
        return done([t])
    if count == 2:
        return done(_ring_svd(t, form.ranks, [jnp.zeros(s, t.dtype) for s in shapes]))
    turned = lambda k: [(k + j) % count for j in range(count)]
    targets = [t.transpose(turned(k)).reshape(n, -1) for k, n in enumerate(sizes)]

    def sweep(cores: Cores) -> list[jax.Array]:
        cores = list(cores)
        for k, (left, _, right) in enumerate(shapes):
            others = _chain([cores[j] for j in turned(k)[1:]])
            design = others.transpose(2, 0, 1).reshape(left * right, -1)
            cores[k] = least_squares(design, targets[k]).reshape(-1, left, right).transpose(1, 0, 2)
        return even_norms(cores)

    error = lambda cores: norm(t.reshape(form.shape) - form.materialize(cores))
    starts = draw(key, shapes, t)
    starts = replace_first(starts, _ring_svd(t, form.ranks, [s[0] for s in starts]))
    if like is not None:
        starts = append(starts, [c.reshape(s) for c, s in zip(like, shapes)])
    starts = jax.vmap(even_norms)(starts)
    return done(best_of(starts, sweep, error, t))


def _ring_svd(t: jax.Array, ranks: Shape, fill: Cores) -> list[jax.Array]:
    """TR-SVD: the first unfolding at rank r_0 r_1, then tensor-train steps; every singular value is shared by its root.

    Where an unfolding has fewer singular vectors than the ranks ask for, columns of `fill` stand in: the tensor does not
    use them yet, alternating least squares can.
    """
    u, rest = _split(t.reshape(t.shape[0], -1), fill[0].transpose(1, 0, 2))
    cores = [u.reshape(-1, ranks[0], ranks[1]).transpose(1, 0, 2)]
    rest = rest.reshape(ranks[0], ranks[1], -1).transpose(1, 2, 0)
    for random in fill[1:-1]:
        u, rest = _split(rest.reshape(math.prod(random.shape[:2]), -1), random)
        cores.append(u.reshape(random.shape))
    return [*cores, rest.reshape(fill[-1].shape)]


def _split(matrix: jax.Array, fill: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(p, q) into (p, rank) and (rank, q), the rank that of the columns of `fill`."""
    fill = fill.reshape(matrix.shape[0], -1)
    u, s, vt = truncated_svd(matrix, min(fill.shape[1], *matrix.shape))
    root, spare = jnp.sqrt(s), fill.shape[1] - len(s)
    fill = fill[:, len(s) :] * (norm(root) / math.sqrt(fill.size))
    return jnp.concatenate([u * root, fill], 1), jnp.pad(root[:, None] * vt, ((0, spare), (0, 0)))
