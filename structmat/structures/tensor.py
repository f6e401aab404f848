"""N-d formats: tensors of any order as small cores, as pure functions on a list of arrays.

A format is a frozen dataclass of static sizes; `TensorFormat` says what it does. The tensor train lives here, TuckerFormat,
CPFormat and TensorRingFormat beside their matrix families. The matrix families bind a weight's axes, split into factors, as
the axes of a tensor; spectral weights and convolution kernels are tensors as they stand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.linalg import truncated_svd

Cores = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class TensorFormat:
    """What every format is: static sizes, and pure functions on a list of cores, real or complex.

    A format defines `shape`, `core_shapes`, `products`, `_names`, `materialize`, `materialize_flops` and
    `project(tensor)`, and the rank rules `of(axes, rank)` and `of_fraction(axes, fraction)`.
    """

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        raise TypeError(f"{type(self).__name__} does not define shape")

    @property
    def core_shapes(self) -> list[Shape]:
        """Of the cores, in the order in which every function takes them."""
        raise TypeError(f"{type(self).__name__} does not define core_shapes")

    @property
    def products(self) -> int:
        """How many products of one entry of each core an entry of the tensor sums."""
        raise TypeError(f"{type(self).__name__} does not define products")

    def _names(self, tensor: str, free: str) -> list[str]:
        """Axis letters of every core, given those of the tensor and unused ones for the ranks."""
        raise TypeError(f"{type(self).__name__} does not define _names")

    @property
    def size(self) -> int:
        """Stored numbers."""
        return sum(math.prod(s) for s in self.core_shapes)

    def init(self, key: jax.Array, std: float = 1.0, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
        """Normal cores of one standard deviation, such that every entry of the tensor has standard deviation `std`.

        An entry sums `products` products of c independent numbers, so a core has (std / sqrt(products))^(1/c). Complex
        entries z have E|z|^2 = std^2.
        """
        shapes = self.core_shapes
        each = (std / math.sqrt(self.products)) ** (1 / len(shapes))
        return [each * jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, len(shapes)), shapes)]

    def contract(self, cores: Cores, x: jax.Array, subscripts: str) -> jax.Array:
        """`jnp.einsum(subscripts, x, tensor)` core by core in the cheapest order, e.g. "bij,ikjl->bkl".

        Axes may be summed, kept, or shared with x and kept (a mode axis). The tensor's letters follow `shape`. The
        tensor itself is formed only where the sizes make that the cheapest order.

        Raises:
          StructureError: subscripts that are not "x,tensor->out" in single letters, one per tensor axis.
        """
        inputs, arrow, out = subscripts.replace(" ", "").partition("->")
        left, comma, tensor = inputs.partition(",")
        if not (arrow and comma) or "," in tensor or not (left + tensor + out).isalpha():
            raise StructureError(f"contract: subscripts {subscripts!r} must read 'x,tensor->out' in single letters")
        if len(tensor) != len(self.shape):
            raise StructureError(f"contract: {tensor!r} names {len(tensor)} axes of a tensor of shape {self.shape}")
        free = "".join(c for c in string.ascii_letters if c not in inputs)
        names = ",".join(self._names(tensor, free))
        return jnp.einsum(f"{left},{names}->{out}", x, *cores, optimize="auto-hq")


@dataclasses.dataclass(frozen=True)
class TensorTrainFormat(TensorFormat):
    """Tensor train: entry [i_1, ..., i_c] is the product of the matrices core_k[:, i_k, :].

    Attributes:
      modes: for every core the tensor axes it carries, `((3,), (4,), (5,))` for a plain tensor of order 3,
        `((n1, m1), (n2, m2))` for a matrix.
      ranks: the interior ranks, one fewer than cores.
    """

    modes: tuple[Shape, ...]
    ranks: Shape

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.modes) - 1:
            raise StructureError(f"a tensor train of {len(self.modes)} cores has {len(self.modes) - 1} interior ranks")
        for k, (rank, most) in enumerate(zip(self.ranks, maximal_ranks(self.modes))):
            if not 1 <= rank <= most:
                raise StructureError(f"tensor train: rank {k} is {rank}, must be in 1..{most} for modes {self.modes}")

    @staticmethod
    def of(modes: Sequence[int | Shape], rank: int) -> TensorTrainFormat:
        """The format with interior ranks min(rank, maximal); a mode may be an int."""
        modes = tuple((m,) if isinstance(m, int) else tuple(m) for m in modes)
        return TensorTrainFormat(modes, tuple(min(rank, most) for most in maximal_ranks(modes)))

    @staticmethod
    def of_fraction(modes: Sequence[int | Shape], fraction: float) -> TensorTrainFormat:
        """About `fraction` of the tensor's numbers: interior ranks proportional to the mean of the sizes they join, within
        1..maximal; the proportion is the one at which the cores, before rounding, hold that many."""
        modes = tuple((m,) if isinstance(m, int) else tuple(m) for m in modes)
        sizes, most = [math.prod(m) for m in modes], maximal_ranks(modes)
        joined = [(a + b) / 2 for a, b in itertools.pairwise(sizes)]
        full = max((m / j for m, j in zip(most, joined)), default=1.0)
        ranks_at = lambda c: [min(c * full * j, m) for j, m in zip(joined, most)]

        def count(c: float) -> float:
            ranks = [1, *ranks_at(c), 1]
            return sum(a * n * b for a, n, b in zip(ranks, sizes, ranks[1:]))

        ranks = (max(1, round(r)) for r in ranks_at(proportion(count, fraction, math.prod(sizes))))
        return TensorTrainFormat(modes, tuple(ranks))

    @property
    def shape(self) -> Shape:
        """The tensor's axes, core by core."""
        return tuple(n for mode in self.modes for n in mode)

    @property
    def core_shapes(self) -> list[Shape]:
        """(r_{k-1}, *modes[k], r_k) per core, the outer ranks 1."""
        ranks = (1, *self.ranks, 1)
        return [(ranks[k], *mode, ranks[k + 1]) for k, mode in enumerate(self.modes)]

    @property
    def products(self) -> int:
        """prod(ranks)."""
        return math.prod(self.ranks)

    def _names(self, tensor: str, free: str) -> list[str]:
        names, at = [], 0
        for k, mode in enumerate(self.modes):
            names.append(free[k] + tensor[at : at + len(mode)] + free[k + 1])
            at += len(mode)
        return names

    def materialize(self, cores: Cores) -> jax.Array:
        """The tensor, of shape `shape`: cores multiplied from the left, one GEMM each."""
        out = cores[0].reshape(-1, cores[0].shape[-1])
        for core in cores[1:]:
            out = (out @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
        return out.reshape(self.shape)

    def materialize_flops(self) -> int:
        """FLOPs of `materialize`."""
        total, rows = 0, math.prod(self.modes[0])
        for rank, mode, right in zip(self.ranks, self.modes[1:], (*self.ranks[1:], 1)):
            total += 2 * rows * rank * math.prod(mode) * right
            rows *= math.prod(mode)
        return total

    def project(self, tensor: jax.Array) -> list[jax.Array]:
        """TT-SVD (Oseledets 2011): truncated SVDs of the unfoldings from left to right.

        The optimum for two cores; for c cores the error is at most sqrt(c - 1) times the optimum's. Neighbouring cores
        share each singular value as its square root.
        """
        rest = tensor.reshape(1, -1)
        cores, carry = [], jnp.ones((1,), rest.dtype)
        for mode, rank in zip(self.modes, self.ranks):
            left = carry.shape[0]
            u, s, vt = truncated_svd(rest.reshape(left * math.prod(mode), -1), rank)
            root, inverse = _roots(s)
            cores.append((carry[:, None, None] * u.reshape(left, -1, rank) * root).reshape(left, *mode, rank))
            rest, carry = s[:, None] * vt, inverse
        cores.append((carry[:, None] * rest).reshape(-1, *self.modes[-1], 1))
        return [c.astype(tensor.dtype) for c in cores]


def _roots(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(s) and its inverse, both zero where s is rounding noise."""
    keep = s > jnp.finfo(s.dtype).eps * s[0]
    root = jnp.where(keep, jnp.sqrt(s), 0)
    return root, jnp.where(keep, 1 / jnp.where(keep, root, 1), 0)


def proportion(count: Callable[[float], float], fraction: float, size: int) -> float:
    """The c in [0, 1] at which the increasing `count` reaches `fraction` of `size`, 1 where it stays below.

    Raises:
      StructureError: a fraction that is not positive.
    """
    if not fraction > 0:
        raise StructureError(f"of_fraction: fraction must be positive, got {fraction!r}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if count(middle) > fraction * size else (middle, high)
    return high


def maximal_ranks(modes: Sequence[Shape]) -> Shape:
    """The ranks at which a tensor train of these modes holds every tensor."""
    sizes = [math.prod(m) for m in modes]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def train_matmul(cores: Cores, x: jax.Array) -> jax.Array:
    """x `(rows, n_1...n_c)` times the matrix of cores (r_{k-1}, n_k, m_k, r_k) -> `(rows, m_1...m_c)`.

    The rows are kept innermost, so that each core is one GEMM batched over the finished output factors and nothing but
    x and y is ever transposed.
    """
    rows, done = x.shape[0], 1
    state = x.T
    for core in cores:
        left, n, m, right = core.shape
        weight = core.transpose(2, 3, 0, 1).reshape(1, m * right, left * n)
        weight = jnp.broadcast_to(weight, (done, *weight.shape[1:]))
        state = jax.lax.dot_general(weight, state.reshape(done, left * n, -1), (((2,), (1,)), ((0,), (0,))))
        done *= m
    return state.reshape(done, rows).T


def train_flops(core_shapes: Sequence[Shape], rows: int) -> int:
    """FLOPs of `train_matmul`."""
    total, done, ahead = 0, 1, math.prod(s[1] for s in core_shapes)
    for shape in core_shapes:
        ahead //= shape[1]
        total += 2 * rows * done * ahead * math.prod(shape)
        done *= shape[2]
    return total
