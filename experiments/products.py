"""The kernels' products at square sizes: arrays, programs, FLOPs and bytes, for the tables of estimates and of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.block_diagonal
import pallas_kernels.block_sparse
import pallas_kernels.kronecker
import pallas_kernels.low_rank
import pallas_kernels.low_rank_plus_block_sparse
import pallas_kernels.monarch
from pallas_kernels import Chip
from pallas_kernels.block_diagonal import block_diagonal
from pallas_kernels.block_diagonal.reference import dense_matrix as dense_block_diagonal
from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.block_sparse.reference import dense_matrix as dense_block_sparse
from pallas_kernels.dispatch import Choice
from pallas_kernels.kronecker import kronecker
from pallas_kernels.kronecker.reference import dense_matrix as dense_kronecker
from pallas_kernels.low_rank import low_rank
from pallas_kernels.low_rank.reference import dense_matrix as dense_low_rank
from pallas_kernels.low_rank_plus_block_sparse import low_rank_plus_block_sparse
from pallas_kernels.low_rank_plus_block_sparse.reference import dense_matrix as dense_low_rank_plus_block_sparse
from pallas_kernels.monarch import monarch
from pallas_kernels.monarch.reference import dense_matrix as dense_monarch

Sizes = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of pallas_kernels at width n.

    Attributes:
      shapes: (n, sizes) -> shapes of the weights.
      apply: (x, *weights, implementation=...) -> y.
      dense: (n, *weights) -> the dense matrix (n, n).
      weight: (n, sizes) -> multiply-adds per row of x.
      choose: (tokens, n, sizes, chip) -> what the rule says in bf16.
      indices: positions of the int32 weights, which come last.
    """

    shapes: Callable[[int, Sizes], list[tuple[int, ...]]]
    apply: Callable[..., jax.Array]
    dense: Callable[..., jax.Array]
    weight: Callable[[int, Sizes], int]
    choose: Callable[[int, int, Sizes, Chip], Choice]
    indices: tuple[int, ...] = ()


def _count(n: int, o: Sizes) -> int:
    return max(1, round(o["density"] * n / o["block"]))


def _columns(n: int, o: Sizes) -> tuple[int, int, int, int]:
    block = int(o["block"])
    return n // block, _count(n, o), block, block


def _slices(n: int, o: Sizes) -> tuple[int, int, int]:
    """(blocks, width of a block, slice rank) of a square Monarch matrix."""
    b = int(o["blocks"])
    return b, n // b, n // b // b


def _sizes(n: int, o: Sizes) -> tuple[int, int, int, int, int]:
    b, p, r = _slices(n, o)
    return b, p, b, p, r


def _blocks(n: int, o: Sizes) -> tuple[int, int, int]:
    b = int(o["blocks"])
    return b, n // b, n // b


def _factors(n: int, o: Sizes) -> tuple[int, int, int, int, int]:
    """(terms, n1, n2, m1, m2) of a square sum of Kronecker products."""
    major = int(o["major"])
    return int(o["terms"]), major, n // major, major, n // major


OPS: dict[str, Op] = {
    "block_diagonal": Op(
        shapes=lambda n, o: [_blocks(n, o)],
        apply=block_diagonal,
        dense=lambda n, blocks: dense_block_diagonal(blocks),
        weight=lambda n, o: n * n // int(o["blocks"]),
        choose=lambda m, n, o, chip: pallas_kernels.block_diagonal.choose(m, _blocks(n, o), jnp.bfloat16, chip),
    ),
    "block_sparse": Op(
        shapes=lambda n, o: [_columns(n, o), _columns(n, o)[:2]],
        apply=block_sparse,
        dense=lambda n, values, rows: dense_block_sparse(values, rows, n),
        weight=lambda n, o: n * _count(n, o) * int(o["block"]),
        choose=lambda m, n, o, chip: pallas_kernels.block_sparse.choose(m, n, _columns(n, o), jnp.bfloat16, chip),
        indices=(1,),
    ),
    "low_rank_plus_block_sparse": Op(
        shapes=lambda n, o: [(int(o["rank"]), n), (int(o["rank"]), n), _columns(n, o), _columns(n, o)[:2]],
        apply=low_rank_plus_block_sparse,
        dense=lambda n, a, b, values, rows: dense_low_rank_plus_block_sparse(a, b, values, rows),
        weight=lambda n, o: 2 * n * int(o["rank"]) + n * _count(n, o) * int(o["block"]),
        choose=lambda m, n, o, chip: pallas_kernels.low_rank_plus_block_sparse.choose(
            m, n, int(o["rank"]), _columns(n, o), jnp.bfloat16, chip
        ),
        indices=(3,),
    ),
    "kronecker": Op(
        shapes=lambda n, o: [(int(o["terms"]), s, s) for s in _factors(n, o)[1:3]],
        apply=kronecker,
        dense=lambda n, a, b: dense_kronecker(a, b),
        weight=lambda n, o: int(o["terms"]) * n * sum(_factors(n, o)[1:3]),
        choose=lambda m, n, o, chip: pallas_kernels.kronecker.choose(m, _factors(n, o), jnp.bfloat16, chip),
    ),
    "monarch": Op(
        shapes=lambda n, o: [
            (_slices(n, o)[0], _slices(n, o)[1], _slices(n, o)[0], _slices(n, o)[2]),
            (_slices(n, o)[0], _slices(n, o)[0], _slices(n, o)[2], _slices(n, o)[1]),
        ],
        apply=monarch,
        dense=lambda n, right, left: dense_monarch(right, left),
        weight=lambda n, o: 2 * n * n // int(o["blocks"]),
        choose=lambda m, n, o, chip: pallas_kernels.monarch.choose(m, _sizes(n, o), jnp.bfloat16, chip),
    ),
    "low_rank": Op(
        shapes=lambda n, o: [(int(o["rank"]), n), (int(o["rank"]), n)],
        apply=low_rank,
        dense=lambda n, a, b: dense_low_rank(a, b),
        weight=lambda n, o: 2 * n * int(o["rank"]),
        choose=lambda m, n, o, chip: pallas_kernels.low_rank.choose(m, (n, int(o["rank"]), n), jnp.bfloat16, chip),
    ),
}
"""Every operation with a kernel."""


@dataclasses.dataclass(frozen=True)
class Product:
    """x (tokens, n) times a structured n x n matrix, bf16.

    Attributes:
      op: a key of OPS. sizes: its options, such as {"block": 128, "density": 0.25}.
    """

    op: str
    tokens: int
    n: int
    sizes: Sizes

    def __str__(self) -> str:
        sizes = ", ".join(f"{k} {v:g}" for k, v in self.sizes.items())
        return f"{self.op} n {self.n}, {self.tokens} tokens, {sizes}"

    @property
    def flops(self) -> int:
        """FLOPs of the forward product."""
        return 2 * self.tokens * OPS[self.op].weight(self.n, self.sizes)

    @property
    def dense_flops(self) -> int:
        """FLOPs of one dense product of the same sizes."""
        return 2 * self.tokens * self.n * self.n

    def gemm_flops(self, implementation: str, direction: str = "forward") -> int:
        """FLOPs of a program: the gradients of x and of the weights take as many as the product each."""
        forward = self.dense_flops if implementation == "dense" else self.flops
        return forward * (3 if direction == "both" else 1)

    def weights(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the weights."""
        op = OPS[self.op]
        dtype = lambda i: jnp.int32 if i in op.indices else jnp.bfloat16
        return [jax.ShapeDtypeStruct(s, dtype(i)) for i, s in enumerate(op.shapes(self.n, self.sizes))]

    def arrays(self, seed: int = 0, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, list[jax.Array]]:
        """Random x of unit variance, and weights whose product has about unit variance too."""
        rng = np.random.default_rng(seed)
        floats = [w for w in self.weights() if w.dtype != jnp.int32]
        depth = (OPS[self.op].weight(self.n, self.sizes) / self.n / len(floats)) ** -0.5

        def draw(w: jax.ShapeDtypeStruct) -> jax.Array:
            if w.dtype == jnp.int32:
                rows = self.n // int(self.sizes["block"])
                return jnp.asarray([np.sort(rng.permutation(rows)[: w.shape[1]]) for _ in range(w.shape[0])], jnp.int32)
            return jnp.asarray(rng.standard_normal(w.shape, np.float32) * depth, dtype)

        x = jnp.asarray(rng.standard_normal((self.tokens, self.n), np.float32), dtype)
        return x, [draw(w) for w in self.weights()]

    def program(self, implementation: str, direction: str = "forward") -> tuple[Callable[..., Any], list[Any]]:
        """A function and the shapes of its arguments: x, the cotangent of y if `direction` is `both`, and the weights.

        Args:
          implementation: `dense` for one GEMM of the same sizes, else as the operation takes it (None follows its rule).
          direction: `forward`, or `both` for y and the gradients of x and of every floating weight.
        """
        op, x = OPS[self.op], jax.ShapeDtypeStruct((self.tokens, self.n), jnp.bfloat16)
        if implementation == "dense":
            apply = lambda x, w: x @ w
            weights = [jax.ShapeDtypeStruct((self.n, self.n), jnp.bfloat16)]
        else:
            apply = lambda x, *w: op.apply(x, *w, implementation=implementation)
            weights = self.weights()
        if direction == "forward":
            return apply, [x, *weights]

        def both(x: jax.Array, g: jax.Array, *weights: jax.Array) -> Any:
            floats = [w for w in weights if w.dtype != jnp.int32]
            rest = [w for w in weights if w.dtype == jnp.int32]  # index arrays come last
            y, pull = jax.vjp(lambda x, *f: apply(x, *f, *rest), x, *floats)
            return y, pull(g)

        return both, [x, x, *weights]

    def choice(self, chip: Chip) -> Choice:
        """What the operation's rule says on `chip`."""
        return OPS[self.op].choose(self.tokens, self.n, self.sizes, chip)

    def bytes(self, direction: str = "forward") -> int:
        """The least HBM traffic: every operand and result once; for `both` x, g and weights in, y and gradients out."""
        held = sum(w.size * w.dtype.itemsize for w in self.weights() if w.dtype != jnp.int32)
        panel = self.tokens * self.n * 2
        return 2 * panel + held if direction == "forward" else 4 * panel + 2 * held

    def floor(self, bandwidth: float, direction: str = "forward") -> float:
        """Seconds to move `bytes`."""
        return self.bytes(direction) / bandwidth


def bound_of(chip: Chip, n: int, direction: str = "forward") -> float:
    """The most any structure can gain over dense at width n, many tokens, bf16.

    With gradients (`both`) dense does three times the arithmetic, while x and the gradient of y are read and y and the
    gradient of x written: twice the bytes.
    """
    return chip.bound(n, n) * (1.5 if direction == "both" else 1.0)


def parse_options(text: str) -> dict[str, float]:
    """`block=128,density=0.25` as numbers."""
    return {k.strip(): float(v) for k, v in (part.split("=") for part in text.split(",") if part.strip())}
