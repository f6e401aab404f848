"""Tiles of the block-diagonal kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, SPILL, token_tiles

WIDEST = 1024
"""Most columns of a block: wider ones take minutes to compile, and XLA is at its best."""
STEP = 2**20
"""Most entries of a strip of x or y in one step: megabytes, long enough to pay for the step, short enough that the first
and the last one, which nothing hides, are a small part."""
HELD = 2**21
"""Most entries of the weights of a group. The compiler keeps operands of its own in VMEM and failed for want of it with
twice as much."""
GROUP = 64
"""Most blocks in one step, whose body is unrolled over them."""
JOIN = 8
"""Most blocks multiplied as one: of narrower ones the kernel would compute little but zeros."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Attributes:
    tokens: rows of x in one grid step. blocks: blocks in one step. join: blocks multiplied as one. vmem: bytes the
    kernel may use.
    """

    tokens: int
    blocks: int
    join: int
    vmem: int


def together(k: int, p: int, s: int) -> int:
    """The fewest of k blocks (p, s), at most `JOIN`, that side by side fill whole lanes; 0 where k has no such divisor."""
    return next((j for j in range(1, min(k, JOIN) + 1) if k % j == 0 and j * p % LANES == 0 and j * s % LANES == 0), 0)


def tiles(kind: str, chip: Chip, m: int, sizes: tuple[int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward`), or None where nothing fits the chip.

    sizes is (k, p, s) with blocks that fill whole lanes `together` within `WIDEST`, size the bytes of an entry. Strips are
    as wide as `STEP` allows, whole rows at best, which move as one piece; on chips of two cores there are two groups.
    Three tenths of VMEM are left to XLA.
    """
    k, p, s = sizes
    join = together(k, p, s)
    most = min(GROUP, k // chip.cores, HELD // (join * p * s), STEP // (128 * max(p, s)))
    groups = [g for g in range(k, join, -1) if k % g == 0 and g % join == 0 and g <= most] + [join]
    *larger, least = token_tiles(m, size)
    pairs = ((t, g) for g in groups for t in [t for t in larger if t * g * max(p, s) <= STEP] + [least])
    held = lambda t, g: _bytes(kind, t, g, join, p, s, size)
    found = next((pair for pair in pairs if held(*pair) <= 0.7 * chip.vmem), None)
    return None if found is None else Tiles(*found, join, held(*found) * 5 // 4 + SPILL)


def _bytes(kind: str, tokens: int, group: int, join: int, p: int, s: int, size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    lanes = lambda width: -(-width // LANES) * LANES
    weights, x, y = group * p * lanes(s), tokens * group * p, tokens * group * s
    whole = group * join * p * s
    held = size * whole if join > 1 else 0
    if kind != "backward":
        return 2 * size * (x + y + weights) + held + 4 * tokens * join * max(p, s)
    return 2 * size * (2 * x + y + 2 * weights) + held + 4 * whole + 4 * join * p * max(join * s, tokens)
