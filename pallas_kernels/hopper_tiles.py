"""Tiles of the Hopper kernels: what fits shared memory, and which of them to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chips import Chip

DEPTH = 64
"""Contraction of one step: 128 bytes of bfloat16, the widest swizzle."""
PIECE = 64
"""Rows stored at once, those of one wgmma."""
BARRIERS = 1024
"""Bytes of shared memory left for barriers and alignment."""
UNMEASURED = "not yet measured on this chip; ask for implementation='pallas' to run it"
"""Why `None` takes XLA where the kernel could run."""


def refused(m: int, dtype: Any, chip: Chip) -> str:
    """What no Hopper kernel takes, or ""."""
    if not chip.sms:
        return f"{chip.name} runs the XLA path; the kernels are for h100 and h200"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"dtype {jnp.dtype(dtype)} is not bfloat16"
    return "" if m else "x has no rows"


@dataclasses.dataclass(frozen=True)
class Tile:
    """One CTA's share of the output: `groups` warpgroups one below the other, each of `rows` x `columns` sums.

    Attributes:
      chunk: columns that lie together in the output.
      slots: steps in flight.
    """

    rows: int
    groups: int
    columns: int
    chunk: int = PIECE
    slots: int = 0

    @property
    def height(self) -> int:
        """Rows of the CTA."""
        return self.rows * self.groups

    @property
    def slot_bytes(self) -> int:
        """Shared memory of one step."""
        return 2 * DEPTH * (self.height + self.columns)

    @property
    def out_bytes(self) -> int:
        """Shared memory of what is being stored."""
        return 2 * 2 * PIECE * self.chunk * self.groups

    @property
    def cycles(self) -> float:
        """Of one step, estimated: 2048 multiply-adds and 32 bytes from L2 a cycle; only ranks tiles."""
        return max(self.height * self.columns * DEPTH / 2048, self.slot_bytes / 32) + 64


SHAPES = ((128, 2), (64, 2), (64, 1))
"""(rows, groups): 256, 128 and 64 rows; the sums of 128 x 128 take 128 registers of a thread."""


def candidates(chunk: int, memory: int) -> Iterable[Tile]:
    """Tiles in `memory` bytes, with as many slots as fit, two to six: a slot is given back one step after its use."""
    for rows, groups in SHAPES:
        for columns in (128, 64):
            tile = Tile(rows, groups, columns, chunk)
            slots = min(6, (memory - BARRIERS - tile.out_bytes) // tile.slot_bytes)
            if slots >= 2:
                yield dataclasses.replace(tile, slots=slots)


def best(tiles: Iterable[tuple[Tile, int]], sms: int) -> Tile:
    """Of tiles, each with how many make the output, the one done first on `sms` multiprocessors."""
    return min(tiles, key=lambda pair: math.ceil(pair[1] / sms) * pair[0].cycles)[0]


def whole(m: int, tile: Tile) -> int:
    """Rows of m padded to whole tiles."""
    return -(-m // tile.height) * tile.height
