"""Monarch matrices (Dao et al. 2022): two block-diagonal factors around a fixed permutation."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from structmat.structures.about import About
from structmat.structures.block_low_rank import BoundBlockLowRank, Order
from structmat.structures.leaf import Shape
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Monarch(Structure):
    """`monarch(blocks, order='paper')`: `blocks` blocks in both factors; every slice has rank min(d_in, d_out) / blocks^2.

    The rectangular width rule is the reference code's: first factor (b, min(in, out)/b, in/b), second
    (b, out/b, min(in, out)/b). Parameters min(in, out) (in + out) / blocks. Resolves to the block-low-rank class.
    """

    blocks: int | None = None
    order: Order = "paper"
    name: ClassVar[str] = "monarch"
    about: ClassVar[About] = About(
        example="monarch(blocks=4)",
        formula="P L Pᵀ R, slices of rank min(n, m) / b²",
        params="min(n, m) (n + m) / b",
        flops="2 × parameters",
        nearest="optimal (SVD per slice), diagonal grams",
        sharding="as block_low_rank; order='paper' adds an all-to-all",
        paper="Dao et al. 2022",
        when="full rank at a fraction of the FLOPs",
        kernel="monarch",
    )

    def check(self) -> None:
        self.need(blocks=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlockLowRank:
        self.required("blocks")
        self.choose("blocks", _valid(in_shape, out_shape), in_shape, out_shape)
        rank = min(math.prod(in_shape), math.prod(out_shape)) // self.blocks**2
        return BoundBlockLowRank(self, in_shape, out_shape, self.blocks, self.blocks, rank, self.order)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.blocks is not None:
            return []
        return [dataclasses.replace(self, blocks=b) for b in reversed(_valid(in_shape, out_shape))]


def _valid(in_shape: Shape, out_shape: Shape) -> list[int]:
    """Block counts that divide both sides, and whose square divides the smaller one so that slice ranks are whole."""
    n, m = math.prod(in_shape), math.prod(out_shape)
    low = min(n, m)
    return [b for b in range(1, math.isqrt(low) + 1) if n % b == m % b == 0 and low % (b * b) == 0]
