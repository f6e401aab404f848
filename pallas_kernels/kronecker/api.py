"""x times a sum of Kronecker products."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.kronecker import tpu
from pallas_kernels.kronecker.configs import BODY, tiles
from pallas_kernels.kronecker.xla import two_gemms
from pallas_kernels.tiling import LANES, sublanes, whole_tiles

OP = "kronecker"
LEAST = 512
"""Rows from which the kernel is faster: up to 256 XLA keeps all between its GEMMs on chip, and is a little faster by the
compiler's estimate on v5e and v6e (32 x 32 kron 128 x 128)."""
KINDS = ("forward", "backward")


def kronecker(x: jax.Array, a: jax.Array, b: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """x `(..., n1 n2)` -> x W `(..., m1 m2)`, W the sum over terms of a_t kron b_t.

    Args:
      a: (terms, n1, m1), the major factors. b: (terms, n2, m2), the minor ones.
      implementation: None follows `choose`; "xla" or "pallas" force one.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0]:
        raise KernelError(f"{OP}: a must be (terms, n1, m1) and b (terms, n2, m2), got {a.shape} and {b.shape}")
    (terms, n1, m1), (_, n2, m2) = a.shape, b.shape
    if not x.ndim or x.shape[-1] != n1 * n2:
        raise KernelError(f"{OP}: x of shape {x.shape} must end in {n1 * n2} for a {a.shape} and b {b.shape}")
    chip, dtype = current_chip(), jnp.result_type(x, a, b)
    m = math.prod(x.shape[:-1])
    chosen = resolve(OP, implementation, choose(m, (terms, n1, n2, m1, m2), dtype, chip), chip)
    flat = x.reshape(m, n1 * n2)
    y = two_gemms(flat, a, b) if chosen == "xla" else product(*(v.astype(dtype) for v in (flat, a, b)), chip)
    return y.reshape(*x.shape[:-1], m1 * m2)


def choose(m: int, sizes: tuple[int, int, int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: on TPU the kernel for minor factors in whole lanes, where it saves XLA's transposes between the GEMMs.

    results/bench/tpu_static.md has the compiler's cycles of both, at n 4096 and 1,024 tokens.
    Fewer than `LEAST` rows stay with XLA, and so does what has a bound below 1, as at n 1024 on v6e: dense itself waits
    for memory there, and XLA's operands stay on chip.

    Args:
      m: rows of x. sizes: (terms, n1, n2, m1, m2).
    """
    terms, n1, n2, m1, m2 = sizes
    spent = terms * min(n2 * m1 * (n1 + m2), n1 * m2 * (n2 + m1))
    facts = {"flop_reduction": n1 * n2 * m1 * m2 / spent, "bound": chip.bound(n1 * n2, m1 * m2)}
    said = f"{terms} terms {n1} x {m1} kron {n2} x {m2}, bound {facts['bound']:.3g}x over dense"
    refused = _unsupported(m, sizes, dtype, chip)
    if refused:
        return Choice("xla", f"no kernel: {refused}; {said}", refused, **facts)
    if m < LEAST:
        return Choice("xla", f"{m} rows, fewer than {LEAST}; {said}", **facts)
    if facts["bound"] < 1:
        return Choice("xla", f"dense is bound by memory; {said}", **facts)
    return Choice("pallas", said, **facts)


def _unsupported(m: int, sizes: tuple[int, int, int, int, int], dtype: Any, chip: Chip) -> str:
    _, n1, n2, m1, m2 = sizes
    dtype = jnp.dtype(dtype)
    if chip.platform != "tpu" or not chip.vmem:
        return f"{chip.name} runs the XLA path"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if n2 % LANES or m2 % LANES:
        return f"minor factors of {n2} x {m2} are not multiples of {LANES} lanes"
    if max(n1, m1) > LANES or n1 % 2 or m1 % 2:
        return f"major factors of {n1} x {m1} are not even and at most {LANES}"
    if m == 0:
        return "x has no rows"
    for kind in KINDS:
        tile = tiles(kind, chip, m, sizes, dtype.itemsize)
        if tile is None:
            return f"{kind}: a tile of rows and both factors exceed {chip.vmem} bytes or {BODY} multiply-adds of a step"
        whole = sublanes(dtype.itemsize)
        if tile.group * n1 % whole or tile.group * m1 % whole:
            return f"{tile.group} rows of {n1} x {m1} are not whole sublanes of {whole}"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, a: jax.Array, b: jax.Array, chip: Chip, interpret: Any = False) -> jax.Array:
    """The kernel and its gradients: x (M, n1 n2), a (terms, n1, m1), b (terms, n2, m2) of one dtype -> (M, m1 m2)."""
    tile = tiles("forward", chip, x.shape[0], _sizes(a, b), x.dtype.itemsize)
    return tpu.forward(whole_tiles(x, tile.tokens), a, b, tile, interpret)[: x.shape[0]]


def _forward(x: jax.Array, a: jax.Array, b: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    return product(x, a, b, chip, interpret), (x, a, b)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b = kept
    tile = tiles("backward", chip, x.shape[0], _sizes(a, b), x.dtype.itemsize)
    dx, da, db = tpu.backward(*(whole_tiles(v, tile.tokens * tile.cores) for v in (x, dy)), a, b, tile, interpret)
    return dx[: x.shape[0]], da.astype(a.dtype), db.astype(b.dtype)


product.defvjp(_forward, _backward)


def _sizes(a: jax.Array, b: jax.Array) -> tuple[int, int, int, int, int]:
    """(terms, n1, n2, m1, m2)."""
    (terms, n1, m1), (_, n2, m2) = a.shape, b.shape
    return terms, n1, n2, m1, m2
