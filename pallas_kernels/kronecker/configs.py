"""Tiles of the Kronecker kernels."""

from __future__ import annotations

import dataclasses

from pallas_kernels.chips import Chip
from pallas_kernels.tiling import LANES, SPILL

TOKENS = (128, 64)
"""Rows of x in one grid step, larger first. By the compiler's estimate at n = 4096 steps of 256 rows take 8 to 10%
longer: bodies are unrolled over lane groups, and more rows in each spill more registers."""
BODY = 2**28
"""Multiply-adds by the minor factors in one step, all unrolled: twice as many take a minute to compile for v4."""
FORWARD_GROUPS, BACKWARD_GROUPS = 2, 4
"""Groups of rows per iteration of the loops over them."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Attributes:
    tokens: rows of x in one grid step. group: rows of x that one GEMM by A takes. vmem: bytes the kernel may use.
    cores: among which the gradients' kernel splits its rows, each with sums of its own.
    """

    tokens: int
    group: int
    vmem: int
    cores: int = 1


def tiles(kind: str, chip: Chip, m: int, sizes: tuple[int, int, int, int, int], size: int) -> Tiles | None:
    """Tiles of one kernel (`forward`, `backward`), or None where nothing fits the chip.

    sizes is (terms, n1, n2, m1, m2), size the bytes of an entry. As many rows share a GEMM by A as fill the matrix unit,
    up to 16. Three tenths of VMEM are left to XLA.
    """
    terms, n1, n2, m1, m2 = sizes
    group = 16
    while group > 1 and group * max(n1, m1) > chip.lanes:
        group //= 2
    least = BACKWARD_GROUPS * group
    for most in TOKENS:
        tokens = min(most, -(-m // least) * least)
        held = _bytes(kind, tokens, group, sizes, size)
        if tokens % least == 0 and held <= 0.7 * chip.vmem and tokens * terms * n1 * n2 * m2 <= BODY:
            return Tiles(tokens, group, held * 5 // 4 + SPILL, chip.cores if m > tokens else 1)
    return None


def _bytes(kind: str, tokens: int, group: int, sizes: tuple[int, int, int, int, int], size: int) -> int:
    """VMEM of one kernel: every operand twice for the pipeline, scratch and the values of the body once."""
    terms, n1, n2, m1, m2 = sizes
    x, y, minor = tokens * n1 * n2, tokens * m1 * m2, terms * n2 * m2
    major = terms * group * m1 * max(LANES, group * n1)
    if kind == "forward":
        return size * (2 * (x + y + minor + major) + terms * tokens * n1 * m2 + y) + 8 * tokens * m2
    rows = BACKWARD_GROUPS * group * max(n1, m1)
    return size * (2 * (2 * x + y + minor + 2 * major) + 2 * x + y) + 8 * (minor + major) + 16 * rows * max(n2, m2)
