"""x times the sum of a low-rank and a block-sparse matrix."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.block_sparse import choose as choose_block_sparse
from pallas_kernels.block_sparse import tpu as block_sparse_tpu
from pallas_kernels.block_sparse.api import checked
from pallas_kernels.chips import Chip, current_chip
from pallas_kernels.dispatch import Choice, Implementation, KernelError, resolve
from pallas_kernels.low_rank import low_rank
from pallas_kernels.low_rank_plus_block_sparse import tpu
from pallas_kernels.low_rank_plus_block_sparse.configs import tiles
from pallas_kernels.tiling import whole_sublanes, whole_tiles

OP = "low_rank_plus_block_sparse"
PAYS = 256
"""Largest rank for which the kernel is chosen: then the low-rank part alone, a pass of its own, is bound by arithmetic."""


def low_rank_plus_block_sparse(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    values: jax.Array,
    rows: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x `(..., K)` -> (x a^T) b + x S `(..., C s)`.

    Args:
      a: (r, K). b: (r, C s).
      values: (C, R, p, s), the R blocks of each of C block columns of S.
      rows: int32 (C, R), the block row of each, unlike within a column.
      implementation: None follows `choose`, and where that says "xla" the rules of both terms; "xla" or "pallas" force.

    Raises:
      KernelError: shapes that do not fit each other, or "pallas" where the kernel does not apply.
    """
    grid, k = checked(x, values, rows)
    n = grid[0] * grid[3]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0] or a.shape[1] != k or b.shape[1] != n:
        raise KernelError(f"{OP}: a must be (r, {k}) and b (r, {n}), got {a.shape} and {b.shape}")
    chip, dtype = current_chip(), jnp.result_type(x, a, b, values)
    m = math.prod(x.shape[:-1])
    chosen = resolve(OP, implementation, choose(m, k, a.shape[0], grid, dtype, chip), chip)
    if chosen == "xla":
        thin = low_rank(x, a, b, implementation=implementation)
        return thin + block_sparse(x, values, rows, implementation=implementation)
    y = product(*(v.astype(dtype) for v in (x.reshape(m, k), a, b, values)), rows, chip)
    return y.reshape(*x.shape[:-1], n)


def choose(m: int, k: int, rank: int, grid: tuple[int, int, int, int], dtype: Any, chip: Chip) -> Choice:
    """The rule: on TPU the kernel for ranks up to 256 wherever that of block_sparse applies beside the factors in VMEM.

    A pass of its own for the low-rank part reads x and the other part's y and writes y: bound by memory up to ranks near
    the chip's ridge. In one pass it adds its arithmetic alone: by the compiler's cycles at n 4096 and 2,048 tokens less
    than half of a pass at rank 128, and at rank 512 no less than a pass (`python -m experiments.static_cycles`).

    Args:
      m: rows of x. k: its columns. rank: r. grid: (C, R, p, s).
    """
    columns, count, p, s = grid
    n = columns * s
    facts = {"flop_reduction": k * n / (rank * (k + n) + count * p * n), "bound": chip.bound(k, n)}
    said = f"rank {rank}, density {count * p / k:.3g}, blocks {p} x {s}, bound {facts['bound']:.3g}x over dense"
    refused = _unsupported(m, k, rank, grid, dtype, chip)
    if refused:
        return Choice("xla", f"no kernel: {refused}; {said}", refused, **facts)
    alone = choose_block_sparse(m, k, grid, dtype, chip)
    if alone.implementation == "xla":
        return Choice("xla", f"{alone.reason}; {said}", **facts)
    if rank > PAYS:
        return Choice("xla", f"rank above {PAYS}, where one pass no longer pays: {said}", **facts)
    return Choice("pallas", said, **facts)


def _unsupported(m: int, k: int, rank: int, grid: tuple[int, int, int, int], dtype: Any, chip: Chip) -> str:
    if chip.platform != "tpu":
        return f"{chip.name} runs both terms one after the other"
    if why := choose_block_sparse(m, k, grid, dtype, chip).unsupported:
        return why
    if rank < 2:
        return f"rank {rank}; Mosaic multiplies vectors by 2 rows and more"
    for kind in ("forward", "backward_x"):
        if tiles(kind, chip, m, k, rank, grid, jnp.dtype(dtype).itemsize) is None:
            return f"{kind}: a panel of x and factors of rank {rank} do not fit {chip.vmem} bytes together"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def product(
    x: jax.Array, a: jax.Array, b: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any = False
) -> jax.Array:
    """The kernel and its gradients: x (M, K), a (r, K), b (r, N), values (C, R, p, s) of one dtype, rows int32 (C, R)."""
    return _forward(x, a, b, values, rows, chip, interpret)[0]


def _forward(
    x: jax.Array, a: jax.Array, b: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any
) -> tuple[jax.Array, Any]:
    padded, m = whole_sublanes(x)
    tile = tiles("forward", chip, padded.shape[0], x.shape[1], a.shape[0], values.shape, x.dtype.itemsize)
    y, h = tpu.forward(padded, a, b, values, rows.reshape(-1), tile, interpret)
    return y[:m], (x, a, b, values, rows, h[:m])


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, a, b, values, rows, h = kept
    (rank, k), index, grid, size = a.shape, rows.reshape(-1), values.shape, x.dtype.itemsize
    padded, m = whole_sublanes(dy)
    tile = tiles("backward_x", chip, padded.shape[0], k, rank, grid, size)
    dx, dh = (v[:m] for v in tpu.backward_x(padded, a, b, values, index, tile, interpret))
    da, db = _over_rows(dh, x), _over_rows(h, dy)
    tile = tiles("backward_values", chip, padded.shape[0], k, rank, grid, size)
    x, dy = (whole_tiles(v, tile.tokens) for v in (x, dy))
    dvalues = block_sparse_tpu.backward_values(x, dy, index, grid, tile, interpret)
    return dx, da.astype(a.dtype), db.astype(b.dtype), dvalues.astype(values.dtype), None


def _over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, summed in f32."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


product.defvjp(_forward, _backward)
