"""Tiles of the block-sparse kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import SPILL, token_tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Attributes:
    tokens: rows of x in one grid step. columns: block columns in one step. vmem: bytes the kernel may use.
    """

    tokens: int
    columns: int
    vmem: int


def tiles(kind: str, chip: Chip, m: int, k: int, grid: tuple[int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward_x`, `backward_values`), or None where nothing fits the chip.

    grid is (C, R, p, s), size the bytes of an entry. Large token tiles come first, because weights are read again for
    every one of them, then as many columns as keep a step's body within 64 dots and VMEM. For the gradient of the blocks
    it is the other way round: columns first, because x is read again for every column group. Three tenths of VMEM are left
    to XLA, which keeps its own operands there.
    """
    columns, count, _, s = grid
    groups = [g for g in range(columns, 0, -1) if columns % g == 0]
    limit = int(0.7 * chip.vmem)
    tokens = token_tiles(m, size)
    if kind == "backward_values":
        fits = ((t, g) for g in groups for t in tokens if _bytes(kind, t, g, k, grid, size) <= limit)
    else:
        few = [g for g in groups if g * count <= 64 and g * s <= 1024] or [1]
        fits = ((t, g) for t in tokens for g in few if _bytes(kind, t, g, k, grid, size) <= limit)
    found = next(fits, None)
    return None if found is None else Tiles(*found, _bytes(kind, *found, k, grid, size) * 5 // 4 + SPILL)


def _bytes(kind: str, tokens: int, group: int, k: int, grid: tuple[int, int, int, int], size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    _, count, p, s = grid
    panel, strip, blocks = tokens * k, tokens * group * s, group * count * p * s
    if kind == "forward":
        return 2 * size * (panel + strip + blocks) + 4 * tokens * s
    if kind == "backward_x":
        return 2 * size * (panel + strip + blocks) + 4 * panel + 4 * tokens * p
    return 2 * size * (panel + strip + blocks) + 4 * blocks + 4 * count * p * s
