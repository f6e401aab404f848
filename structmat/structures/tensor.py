"""N-d formats: tensors of any order as small cores, as pure functions on a list of arrays.

A format is a frozen dataclass of static sizes with `core_shapes`, `init`, `contract`, `materialize` and `project`.
The matrix families (tensor_train) give it one core per pair of input and output factors.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.linalg import truncated_svd

Cores = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class TensorTrainFormat:
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

    @property
    def shape(self) -> Shape:
        """The tensor's axes, core by core."""
        return tuple(n for mode in self.modes for n in mode)

    @property
    def core_shapes(self) -> list[Shape]:
        """(r_{k-1}, *modes[k], r_k) per core, the outer ranks 1."""
        ranks = (1, *self.ranks, 1)
        return [(ranks[k], *mode, ranks[k + 1]) for k, mode in enumerate(self.modes)]

    def init(self, key: jax.Array, std: float = 1.0, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
        """Normal cores of one standard deviation, such that every entry of the tensor has standard deviation `std`.

        An entry sums prod(ranks) products of c independent numbers, so a core has (std / sqrt(prod(ranks)))^(1/c).
        """
        each = (std / math.sqrt(math.prod(self.ranks))) ** (1 / len(self.modes))
        keys = jax.random.split(key, len(self.modes))
        return [each * jax.random.normal(k, s, dtype) for k, s in zip(keys, self.core_shapes)]

    def contract(self, cores: Cores, x: jax.Array, subscripts: str) -> jax.Array:
        """`jnp.einsum(subscripts, x, tensor)` core by core in the cheapest order, e.g. "bij,ikjl->bkl".

        Axes may be summed, kept, or shared with x and kept (a mode axis). The tensor's letters follow `shape`.

        Raises:
          StructureError: subscripts that are not "x,tensor->out" in single letters, one per tensor axis.
        """
        inputs, arrow, out = subscripts.replace(" ", "").partition("->")
        left, comma, tensor = inputs.partition(",")
        if not (arrow and comma) or "," in tensor or not (left + tensor + out).isalpha():
            raise StructureError(f"contract: subscripts {subscripts!r} must read 'x,tensor->out' in single letters")
        if len(tensor) != len(self.shape):
            raise StructureError(f"contract: {tensor!r} names {len(tensor)} axes of a tensor of shape {self.shape}")
        free = [c for c in string.ascii_letters if c not in inputs]
        names, at = [], 0
        for k, mode in enumerate(self.modes):
            names.append(free[k] + tensor[at : at + len(mode)] + free[k + 1])
            at += len(mode)
        return jnp.einsum(f"{left},{','.join(names)}->{out}", x, *cores, optimize="optimal")

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
