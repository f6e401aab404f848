"""Tiles of the two-stage kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, SPILL, token_tiles


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Attributes:
    tokens: rows of x in one grid step. blocks: output blocks whose weights are held at once. vmem: bytes the kernel may use.
    """

    tokens: int
    blocks: int
    vmem: int


def tiles(kind: str, chip: Chip, m: int, sizes: tuple[int, int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward_x`, `backward_weights`), or None where nothing fits the chip.

    sizes is (k, p, l, s, r), size the bytes of an entry. All blocks at once come first, because x is read again for
    every group of them, then large token tiles. Three tenths of VMEM are left to XLA.
    """
    k, p, l, s, r = sizes
    if kind == "backward_x":
        k, p, l, s = l, s, k, p
    join = max(1, LANES // r)
    groups = [g for g in range(l, 0, -1) if l % g == 0 and g % join == 0 and (g * r % LANES == 0 or g == l)]
    fits = (
        (t, g)
        for g in groups
        for t in token_tiles(m, size, 512)
        if _bytes(kind, t, g, (k, p, l, s, r), size) <= 0.7 * chip.vmem
    )
    found = next(fits, None)
    if found is None:
        return None
    return Tiles(*found, _bytes(kind, *found, (k, p, l, s, r), size) * 5 // 4 + SPILL)


def _bytes(kind: str, tokens: int, group: int, sizes: tuple[int, int, int, int, int], size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    k, p, _, s, r = sizes
    join = max(1, LANES // r)
    weights, panel, strip = k * p * group * r + group * k * r * s, tokens * k * p, tokens * group * s
    held = 2 * size * (panel + strip + weights) + size * join * tokens * k * r + 4 * tokens * max(256, join * r)
    if kind == "backward_weights":
        held += 2 * 4 * weights + 4 * (k * r * s + p * join * r)
    return held
