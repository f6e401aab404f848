"""Tiles of the two-stage kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, SPILL, token_tiles

BODY = 2**17
"""Rows of x times matrix-unit tiles of one basic block: several GEMMs for the scheduler to overlap, few enough to compile
in seconds."""
TOKENS = 256
"""Rows of a token tile: with more, the first one waits longer for x than the pipeline gains."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Attributes:
    tokens: rows of x in one grid step. blocks: output blocks whose weights are held at once. vmem: bytes the kernel may use.
    first, second: GEMMs of each stage in one basic block. cores: tensor cores the token tiles are split over.
    """

    tokens: int
    blocks: int
    vmem: int
    first: int = 1
    second: int = 1
    cores: int = 1


def tiles(kind: str, chip: Chip, m: int, sizes: tuple[int, int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward_x`, `backward`, `backward_weights`), or None where nothing fits the chip.

    sizes is (k, p, l, s, r), size the bytes of an entry. All blocks at once come first, because x is read again for
    every group of them, then large token tiles; `backward`, which makes all gradients together, has all blocks or does
    not fit. Three tenths of VMEM are left to XLA.
    """
    k, p, l, s, r = sizes
    kept = kind != "backward_x" and keeps(chip, p, size)
    if kind == "backward_x":
        k, p, l, s = l, s, k, p
    join = max(1, LANES // r)
    groups = [g for g in range(l, 0, -1) if l % g == 0 and g % join == 0 and (g * r % LANES == 0 or g == l)]
    groups = [l] if kind == "backward" else groups
    fits = (
        (t, g)
        for g in groups
        for t in token_tiles(m, size, TOKENS)
        if _bytes(kind, t, g, (k, p, l, s, r), size, kept) <= 0.7 * chip.vmem
    )
    found = next(fits, None)
    if found is None:
        return None
    tokens, group = found
    across = lambda n: -(-n // max(chip.lanes, LANES))
    stretch = lambda depth, width: max(1, BODY // (tokens * across(depth) * across(width)))
    return Tiles(
        *found,
        _bytes(kind, *found, (k, p, l, s, r), size, kept) * 5 // 4 + SPILL,
        first=stretch(p, group * r),
        second=stretch(k * r, s),
        cores=chip.cores if -(-m // tokens) % chip.cores == 0 else 1,
    )


def keeps(chip: Chip, p: int, size: int) -> bool:
    """Whether Z is kept for the backward pass: where making it again, 2 p FLOPs an entry, takes longer than writing and
    reading it."""
    return p > size * chip.ridge


def _bytes(kind: str, tokens: int, group: int, sizes: tuple[int, int, int, int, int], size: int, kept: bool) -> int:
    """VMEM of one kernel: operands of the pipeline twice, what is held once, and the values of the body."""
    k, p, _, s, r = sizes
    join = max(1, LANES // r)
    weights, panel, strip = k * p * group * r + group * k * r * s, tokens * k * p, tokens * group * s
    held = size * (2 * (panel + strip) + weights + tokens * group * k * r) + 4 * tokens * max(256, join * r)
    if kept:
        held += 2 * size * tokens * group * k * r
    if kind in ("backward", "backward_weights"):
        held += 4 * (weights + max(k * r * s, p * group * r))
    if kind == "backward":
        held += 2 * size * panel
    return held
