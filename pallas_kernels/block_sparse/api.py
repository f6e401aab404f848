"""x times a block-sparse matrix in blocked-ELL layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import tpu
from pallas_kernels.block_sparse.configs import tiles
from pallas_kernels.block_sparse.xla import block_product
from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.hopper_tiles import UNMEASURED
from pallas_kernels.tiling import LANES, token_tiles, whole_sublanes, whole_tiles

OP = "block_sparse"


def block_sparse(
    x: jax.Array, values: jax.Array, rows: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """x `(..., K)` -> x W `(..., C s)`.

    Args:
      values: (C, R, p, s), the R blocks of each of C block columns.
      rows: int32 (C, R), the block row of each, unlike within a column.
      implementation: None follows `choose`; "xla" or "pallas" force one.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.
    """
    grid, k = checked(x, values, rows)
    chip = current_chip()
    m, dtype = math.prod(x.shape[:-1]), jnp.result_type(x, values)
    chosen = resolve(OP, implementation, choose(m, k, grid, dtype, chip), chip)
    flat = x.reshape(m, k)
    if chosen == "xla":
        y = block_product(flat, values, rows)
    else:
        y = _kernels(chip)(flat.astype(dtype), values.astype(dtype), rows, chip)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def choose(m: int, k: int, grid: tuple[int, int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: on TPU the kernel wherever it applies, that is for blocks in whole lanes whose panels fit VMEM.

    On Hopper, where the kernels take blocks of multiples of 64 in bfloat16, XLA until they have been measured there.

    XLA has no block-sparse product; what it makes of gathers and batched GEMMs copies the activations R p / K times.
    Below 256-wide blocks v6e and v7x, whose matrix units are 256 wide, fill half of them, and XLA is estimated faster all
    the same. Elsewhere the XLA path runs.

    Args:
      m: rows of x. k: its columns. grid: (C, R, p, s).
    """
    columns, count, p, s = grid
    reduction = k / (count * p)
    facts = {"flop_reduction": reduction, "bound": chip.bound(k, columns * s)}
    density = f"density {1 / reduction:.3g}, blocks {p} x {s}, bound {facts['bound']:.3g}x over dense"
    refused = _unsupported(m, k, grid, dtype, chip)
    if refused:
        return Choice("xla", f"no kernel: {refused}; {density}", refused, **facts)
    if chip.platform == "gpu":
        return Choice("xla", f"{UNMEASURED}; {density}", **facts)
    if min(p, s) < chip.lanes:
        return Choice("xla", f"blocks fill half of {chip.lanes}-wide matrix units; {density}", **facts)
    return Choice("pallas", density, **facts)


def _unsupported(m: int, k: int, grid: tuple[int, int, int, int], dtype: Any, chip: Chip) -> str:
    _, _, p, s = grid
    dtype = jnp.dtype(dtype)
    if chip.platform == "gpu":
        from pallas_kernels.block_sparse import gpu  # half a second, and Mosaic GPU is not in every jaxlib

        return gpu.unsupported(m, grid, dtype, chip)
    if chip.platform != "tpu" or not chip.vmem:
        return f"{chip.name} runs the XLA path"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {dtype} is neither bfloat16 nor float32"
    if p % LANES or s % LANES:
        return f"blocks {p} x {s} are not multiples of {LANES} lanes"
    if m == 0:
        return "x has no rows"
    for kind in ("forward", "backward_x", "backward_values"):
        if tiles(kind, chip, m, k, grid, dtype.itemsize) is None:
            return f"{kind}: a panel of {token_tiles(m, dtype.itemsize)[-1]} rows of {k} does not fit {chip.vmem} bytes"
    return ""


def _kernels(chip: Chip) -> Callable[..., jax.Array]:
    if chip.platform == "gpu":
        from pallas_kernels.block_sparse import gpu

        return gpu.product
    return product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any = False) -> jax.Array:
    """The kernel and its gradients: x (M, K), values (C, R, p, s) of one dtype, rows int32 (C, R) -> (M, C s)."""
    padded, m = whole_sublanes(x)
    tile = tiles("forward", chip, padded.shape[0], x.shape[1], values.shape, x.dtype.itemsize)
    return tpu.forward(padded, values, rows.reshape(-1), tile, interpret)[:m]


def _forward(x: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    return product(x, values, rows, chip, interpret), (x, values, rows)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, values, rows = kept
    (k, grid, size), (dy, m) = (x.shape[1], values.shape, x.dtype.itemsize), whole_sublanes(dy)
    tile = tiles("backward_x", chip, dy.shape[0], k, grid, size)
    dx = tpu.backward_x(dy, values, rows.reshape(-1), k, tile, interpret)[:m]
    tile = tiles("backward_values", chip, dy.shape[0], k, grid, size)
    x, dy = (whole_tiles(a, tile.tokens) for a in (x, dy))
    dw = tpu.backward_values(x, dy[: x.shape[0]], rows.reshape(-1), grid, tile, interpret)
    return dx, dw, None


product.defvjp(_forward, _backward)


def checked(x: jax.Array, values: jax.Array, rows: jax.Array) -> tuple[tuple[int, int, int, int], int]:
    """(C, R, p, s) and the columns of x; KernelError where the three do not fit each other."""
    if values.ndim != 4 or rows.shape != values.shape[:2]:
        raise KernelError(f"{OP}: values must be (C, R, p, s) and rows (C, R), got {values.shape} and {rows.shape}")
    if rows.dtype != jnp.int32:
        raise KernelError(f"{OP}: rows must be int32, got {rows.dtype}")
    k, p = x.shape[-1] if x.ndim else 0, values.shape[2]
    if k == 0 or k % p:
        raise KernelError(f"{OP}: x of shape {x.shape} does not end in whole blocks of {p}")
    if not isinstance(rows, jax.core.Tracer) and rows.size:
        held = np.asarray(rows)
        low, high = held.min(), held.max()
        if low < 0 or high >= k // p:
            raise KernelError(f"{OP}: rows name block rows {low}..{high}; valid are 0..{k // p - 1}")
    return values.shape, k
