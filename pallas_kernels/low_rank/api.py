"""x times a matrix of low rank, both factors stored with the rank first."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.hopper_tiles import DEPTH, UNMEASURED, refused
from pallas_kernels.low_rank.xla import two_dots

OP = "low_rank"
MOST = 256
"""Largest rank of the kernel: the widest wgmma, whose sums take half the registers of a thread."""


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """x `(..., n)` -> x a^T b `(..., m)`.

    Args:
      a: (r, n). b: (r, m).
      implementation: None follows `choose`; "xla" or "pallas" force one.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.

    Examples:
      >>> low_rank(jnp.ones((3, 64)), jnp.ones((4, 64)), jnp.ones((4, 32))).shape
      (3, 32)
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise KernelError(f"{OP}: a must be (r, n) and b (r, m), got {a.shape} and {b.shape}")
    (r, n), out = a.shape, b.shape[1]
    if not x.ndim or x.shape[-1] != n:
        raise KernelError(f"{OP}: x of shape {x.shape} must end in {n} for a {a.shape}")
    chip, dtype = current_chip(), jnp.result_type(x, a, b)
    m = math.prod(x.shape[:-1])
    if resolve(OP, implementation, choose(m, (n, r, out), dtype, chip), chip) == "xla":
        return two_dots(x, a, b)
    from pallas_kernels.low_rank import gpu  # half a second, and Mosaic GPU is not in every jaxlib

    y = gpu.product(x.reshape(m, n).astype(dtype), a.astype(dtype), b.astype(dtype), chip)
    return y.reshape(*x.shape[:-1], out)


def choose(m: int, sizes: tuple[int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: XLA. On TPU it fuses the two products, keeps the narrow one on chip, and left a kernel nothing to gain.

    On Hopper it does not fuse them, and a kernel does for ranks of multiples of 64 up to 256 in bfloat16; XLA is taken
    until that has been measured there.

    Args:
      m: rows of x. sizes: (n, r, m), rows, rank and columns of the matrix.
    """
    n, r, out = sizes
    facts = {"flop_reduction": n * out / (r * (n + out)), "bound": chip.bound(n, out)}
    said = f"{n} x {out}, rank {r}, bound {facts['bound']:.3g}x over dense"
    if chip.platform == "tpu":
        return Choice("xla", f"XLA fuses both products; {said}", "XLA fuses both products", **facts)
    why = _unsupported(m, sizes, dtype, chip)
    return Choice("xla", f"no kernel: {why}; {said}" if why else f"{UNMEASURED}; {said}", why, **facts)


def _unsupported(m: int, sizes: tuple[int, int, int], dtype: Any, chip: Chip) -> str:
    n, r, out = sizes
    if why := refused(m, dtype, chip):
        return why
    if r % DEPTH or r > MOST:
        return f"rank {r} is not one of {', '.join(map(str, range(DEPTH, MOST + 1, DEPTH)))}"
    if n % DEPTH or out % DEPTH:
        return f"{n} x {out} are not multiples of {DEPTH}"
    return ""
