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


STEP = 4e-7
"""Seconds a grid step costs however little it does, 500 to 800 cycles."""
REFILL = 32
"""Rows' worth of time a matrix unit loses when it takes up other weights."""

ENOUGH = 256
"""Token tile of the gradient of x from which larger ones no longer pay by the compiler's estimates, unless weights read
again bound the kernel: `seconds`, which takes this gradient for a forward pass the other way round, would go further."""


def tiles(kind: str, chip: Chip, m: int, k: int, grid: tuple[int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward_x`, `backward_values`), or None where nothing fits the chip.

    Of those that fit, the ones `seconds` finds fastest. grid is (C, R, p, s), size the bytes of an entry. The body of a
    step of the first two has at most 64 dots, which keeps compiling short. Three tenths of VMEM are left to XLA, which
    keeps its own operands there.
    """
    columns, count, _, s = grid
    groups = [g for g in range(columns, 0, -1) if columns % g == 0]
    if kind != "backward_values":
        groups = [g for g in groups if g * count <= 64 and g * s <= 1024] or [1]
    limit = int(0.7 * chip.vmem)
    tokens = token_tiles(m, size)
    if kind == "backward_x":
        tokens = [t for t in tokens if t <= max(ENOUGH, 1.5 * chip.ridge)] or tokens[-1:]
    fits = [(t, g) for t in tokens for g in groups if _bytes(kind, t, g, k, grid, size) <= limit]
    if not fits:
        return None
    found = min(fits, key=lambda tile: seconds(kind, chip, *tile, m, k, grid, size))
    return Tiles(*found, _bytes(kind, *found, k, grid, size) * 5 // 4 + SPILL)


def seconds(
    kind: str, chip: Chip, tokens: int, group: int, m: int, k: int, grid: tuple[int, int, int, int], size: int
) -> float:
    """About what a kernel takes: arithmetic or traffic, the steps, and what nothing hides, the first loads and the last store.

    Large token tiles have the weights, or many columns x, read fewer times; small ones start sooner and leave no core of
    several idle. It only ranks tiles: what the chosen ones take by the compiler's estimate is in
    results/bench/tpu_static.md.
    """
    columns, count, p, s = grid
    steps = -(-m // tokens) * (columns // group)
    panel, strip, blocks = tokens * k, tokens * group * s, group * count * p * s
    first, last = {
        "forward": (panel + blocks, strip),
        "backward_x": (strip + blocks, panel),
        "backward_values": (panel + strip, blocks),
    }[kind]
    again = m * k * (columns // group) if kind == "backward_values" else m * k + blocks * steps
    traffic = size * (again + m * columns * s + (columns * count * p * s if kind == "backward_values" else 0))
    outer = columns // group if kind == "backward_values" else -(-m // tokens)
    uneven = -(-outer // chip.cores) * chip.cores / outer
    arithmetic = 2 * m * columns * count * p * s / chip.flops * (1 + REFILL / tokens) * (size / 2) * uneven
    return max(arithmetic, traffic / chip.bandwidth) + size * (first + last) / chip.bandwidth + steps * STEP


def _bytes(kind: str, tokens: int, group: int, k: int, grid: tuple[int, int, int, int], size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    _, count, p, s = grid
    panel, strip, blocks = tokens * k, tokens * group * s, group * count * p * s
    if kind == "forward":
        return 2 * size * (panel + strip + blocks) + 4 * tokens * s
    if kind == "backward_x":
        return 2 * size * (panel + strip + blocks) + 4 * panel + 4 * tokens * p
    return 2 * size * (panel + strip + blocks) + 4 * blocks + 4 * count * p * s
