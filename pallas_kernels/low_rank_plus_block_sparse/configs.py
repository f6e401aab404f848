"""Tiles of the kernels for low rank plus block sparse: those of block sparse in the VMEM that the factors leave."""

from __future__ import annotations

import dataclasses

from pallas_kernels.block_sparse.configs import Tiles
from pallas_kernels.block_sparse.configs import tiles as block_sparse_tiles
from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, token_tiles


def tiles(kind: str, chip: Chip, m: int, k: int, rank: int, grid: tuple[int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward_x`, `backward_values`), or None where nothing fits the chip.

    grid is (C, R, p, s), size the bytes of an entry. The gradient of the blocks is that of block sparse alone.
    """
    factors = 0 if kind == "backward_values" else _bytes(m, k, rank, grid, size)
    left = dataclasses.replace(chip, vmem=chip.vmem - factors)
    found = block_sparse_tiles(kind, left, m, k, grid, size)
    return None if found is None else dataclasses.replace(found, vmem=found.vmem + factors)


def _bytes(m: int, k: int, rank: int, grid: tuple[int, int, int, int], size: int) -> int:
    """VMEM of both factors and of the narrow activations, twice for the pipeline; these once more in f32."""
    columns, _, _, s = grid
    lanes = -(-rank // LANES) * LANES
    return 2 * size * lanes * (k + columns * s) + (2 * size + 4) * lanes * token_tiles(m, size)[0]
