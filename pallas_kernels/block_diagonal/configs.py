"""Tiles of the block-diagonal kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, SPILL, token_tiles

STRIP = 1024
"""Most columns of x or y in one step, and so of a block: wider ones take minutes to compile, and XLA is at its best."""

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

    sizes is (k, p, s) with blocks that fill whole lanes `together` within `STRIP`, size the bytes of an entry. A step
    takes strips of up to `STRIP` columns, long enough to pay for itself and short enough that the first and the last one,
    which nothing hides, are a small part. Three tenths of VMEM are left to XLA.
    """
    k, p, s = sizes
    join = together(k, p, s)
    group = max(g for g in range(join, k + 1, join) if k % g == 0 and g * max(p, s) <= STRIP)
    fits = (t for t in token_tiles(m, size) if _bytes(kind, t, group, join, p, s, size) <= 0.7 * chip.vmem)
    tokens = next(fits, None)
    if tokens is None:
        return None
    return Tiles(tokens, group, join, _bytes(kind, tokens, group, join, p, s, size) * 5 // 4 + SPILL)


def _bytes(kind: str, tokens: int, group: int, join: int, p: int, s: int, size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    lanes = lambda width: -(-width // LANES) * LANES
    weights, x, y = group * p * lanes(s), tokens * group * p, tokens * group * s
    whole = group * join * p * s
    held = size * whole if join > 1 else 0
    if kind != "backward":
        return 2 * size * (x + y + weights) + held + 4 * tokens * join * max(p, s)
    return 2 * size * (2 * x + y + 2 * weights) + held + 4 * whole + 4 * join * p * max(join * s, tokens)
