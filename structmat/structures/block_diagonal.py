"""Block diagonal: independent dense blocks along the diagonal, one batched GEMM."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.block_diagonal import block_diagonal
from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class BlockDiagonal(Structure):
    """`block_diagonal(blocks)`: `blocks` blocks (d_in/blocks, d_out/blocks); parameters d_in d_out / blocks."""

    blocks: int | None = None
    name: ClassVar[str] = "block_diagonal"
    about: ClassVar[About] = About(
        example="block_diagonal(blocks=8)",
        formula="b dense blocks on the diagonal",
        params="n m / b",
        flops="2 n m / b",
        nearest="optimal, diagonal grams",
        sharding="whole blocks; no communication",
        paper="-",
        when="grouped features; no mixing between blocks",
        kernel="block_diagonal",
    )

    def check(self) -> None:
        self.need(blocks=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlockDiagonal:
        self.required("blocks")
        self.choose("blocks", _valid(in_shape, out_shape), in_shape, out_shape)
        return BoundBlockDiagonal(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.blocks is not None:
            return []
        return [dataclasses.replace(self, blocks=b) for b in reversed(_valid(in_shape, out_shape))]


def _valid(in_shape: Shape, out_shape: Shape) -> list[int]:
    return divisors(math.gcd(math.prod(in_shape), math.prod(out_shape)))


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlockDiagonal(Bound):
    """Block diagonal with sizes. Leaf `blocks` (b, d_in/b, d_out/b)."""

    grams: ClassVar[str] = "diagonal"
    splits: ClassVar[tuple[str, ...]] = ("paired",)
    last: ClassVar[str] = "blocks"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(b, rows of a block, columns of a block)."""
        b = self.structure.blocks
        return b, self.d_in // b, self.d_out // b

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        b, p, s = self.sizes
        axes = (first_axis(in_axes), "block_in", "block_out")
        return {"blocks": self.factor((b, p, s), axes, p, s, share=1)}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return block_diagonal(x, params["blocks"])

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return block_diagonal(y, params["blocks"].swapaxes(1, 2))

    def materialize(self, params: Params) -> jax.Array:
        b, p, s = self.sizes
        at = jnp.arange(b)
        grid = jnp.zeros((b, b, p, s), params["blocks"].dtype).at[at, at].set(params["blocks"])
        return grid.transpose(0, 2, 1, 3).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        b, p, s = self.sizes
        rows = params["blocks"].reshape(self.d_in, s)[ids]
        here = (ids // p)[..., None] == jnp.arange(b)
        return jnp.where(here[..., None], rows[..., None, :], 0).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the diagonal blocks of w, whatever the weights of diagonal grams."""
        self.check_dense(w)
        for what, gram, size in (("in_gram", in_gram, self.d_in), ("out_gram", out_gram, self.d_out)):
            if gram is not None:
                diagonal_roots(gram, size, what, self.structure.name)
        b, p, s = self.sizes
        at = jnp.arange(b)
        return {"blocks": w.reshape(b, p, b, s).transpose(0, 2, 1, 3)[at, at]}

    def _flops(self, rows: int) -> int:
        b, p, s = self.sizes
        return 2 * rows * b * p * s

    def _materialize_flops(self) -> int:
        return 0
