"""x times a block-diagonal matrix."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_diagonal import tpu
from pallas_kernels.block_diagonal.configs import JOIN, WIDEST, tiles, together
from pallas_kernels.block_diagonal.xla import batched
from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.tiling import LANES, whole_sublanes, whole_tiles

OP = "block_diagonal"


def block_diagonal(x: jax.Array, blocks: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """x `(..., k p)` -> x W `(..., k s)`.

    Args:
      blocks: (k, p, s), the blocks in order of the diagonal.
      implementation: None follows `choose`; "xla" or "pallas" force one.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.
    """
    if blocks.ndim != 3:
        raise KernelError(f"{OP}: blocks must be (k, p, s), got {blocks.shape}")
    k, p, s = blocks.shape
    if not x.ndim or x.shape[-1] != k * p:
        raise KernelError(f"{OP}: x of shape {x.shape} must end in {k * p} for blocks {blocks.shape}")
    chip, dtype, m = current_chip(), jnp.result_type(x, blocks), math.prod(x.shape[:-1])
    chosen = resolve(OP, implementation, choose(m, blocks.shape, dtype, chip), chip)
    flat = x.reshape(m, k * p)
    if chosen == "xla":
        y = batched(flat, blocks)
    else:
        y = product(flat.astype(dtype), blocks.astype(dtype), chip)
    return y.reshape(*x.shape[:-1], k * s)


def choose(m: int, sizes: tuple[int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: on TPU the kernel wherever it applies and there are several blocks, up to `WIDEST`.

    It reads strips of x and writes strips of y where they are, and makes both gradients in one pass over x and dy; XLA's
    batched GEMMs transpose activations round every product. results/bench/tpu_static.md has the compiler's cycles of both.
    Blocks joined to fill lanes may take half as much arithmetic again as memory allows, about what the transposes cost.

    Args:
      m: rows of x. sizes: (k, p, s).
    """
    k, p, s = sizes
    facts = {"flop_reduction": float(k), "bound": chip.bound(k * p, k * s)}
    said = f"{k} blocks of {p} x {s}, bound {facts['bound']:.3g}x over dense"
    refused = _unsupported(m, sizes, dtype, chip)
    if refused:
        return Choice("xla", f"no kernel: {refused}; {said}", refused, **facts)
    if k == 1:
        return Choice("xla", f"one block is a dense matrix; {said}", **facts)
    join = together(*sizes)
    if join > 1 and join * p * s / (p + s) > 1.5 * chip.ridge:
        return Choice("xla", f"{join} blocks joined, zeros included, are bound by arithmetic; {said}", **facts)
    return Choice("pallas", said, **facts)


def _unsupported(m: int, sizes: tuple[int, int, int], dtype: Any, chip: Chip) -> str:
    k, p, s = sizes
    dtype, join = jnp.dtype(dtype), together(*sizes)
    if chip.platform != "tpu" or not chip.vmem:
        return f"{chip.name} runs the XLA path"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if not join:
        return f"{k} blocks of {p} x {s} do not join, {JOIN} at most, into multiples of {LANES} lanes"
    if join * max(p, s) > WIDEST:
        return f"blocks of {join * p} x {join * s} are wider than {WIDEST}"
    if m == 0:
        return "x has no rows"
    for kind in ("forward", "backward"):
        if tiles(kind, chip, m, sizes, dtype.itemsize) is None:
            return f"{kind}: a block of {join * p} x {join * s} does not fit {chip.vmem} bytes"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, blocks: jax.Array, chip: Chip, interpret: Any = False) -> jax.Array:
    """The kernel and its gradients: x (M, k p), blocks (k, p, s) of one dtype -> (M, k s)."""
    padded, m = whole_sublanes(x)
    tile = tiles("forward", chip, padded.shape[0], blocks.shape, x.dtype.itemsize)
    return tpu.forward(padded, blocks, tile, interpret)[:m]


def _forward(x: jax.Array, blocks: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    return product(x, blocks, chip, interpret), (x, blocks)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, blocks), m = kept, dy.shape[0]
    padded, _ = whole_sublanes(x)
    tile = tiles("backward", chip, padded.shape[0], blocks.shape, x.dtype.itemsize)
    x, dy = (whole_tiles(a, tile.tokens) for a in (x, dy))
    dx, dblocks = tpu.backward(x, dy, blocks, tile, interpret)
    return dx[:m], dblocks


product.defvjp(_forward, _backward)
