"""Blocked-ELL products on Hopper: y = x W, x' = y W^T and the gradient of the blocks, each as one kernel.

All three are walks of `pallas_kernels.hopper`: tiles of dense products whose places are read from index vectors. Lowered
and run in interpret mode only: no time or number of them was taken on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import Chip
from pallas_kernels.hopper import Walk, walk_product
from pallas_kernels.hopper_tiles import DEPTH, Tile, best, candidates, refused, whole
from pallas_kernels.tiling import whole_tiles

Grid = tuple[int, int, int, int]


def tile_of(kind: str, chip: Chip, m: int, k: int, grid: Grid) -> Tile:
    """The tile of one kernel (`forward`, `backward_x`, `backward_values`); one divides all blocks of multiples of 64.

    grid is (C, R, p, s). For the gradient of the blocks all warpgroups of a CTA work on one block column.
    """
    columns, count, p, s = grid
    if kind == "backward_values":
        fits = [t for t in candidates(DEPTH, chip.vmem) if not (p % t.rows or count * p % t.height or s % t.columns)]
        return best([(t, columns * count * p // t.height * (s // t.columns)) for t in fits], chip.sms)
    width, total = (s, columns * s) if kind == "forward" else (p, k)
    fits = [t for t in candidates(DEPTH, chip.vmem) if width % t.columns == 0]
    return best([(t, whole(m, t) // t.height * (total // t.columns)) for t in fits], chip.sms)


def forward(x: jax.Array, values: jax.Array, rows: jax.Array, tile: Tile, chip: Chip, interpret: Any) -> jax.Array:
    """x (M, K), values (C, R, p, s), rows int32 (C, R) -> (M, C s)."""
    (columns, count, p, s), m = values.shape, x.shape[0]
    x = whole_tiles(x, tile.height)
    deep, across = p // DEPTH, s // tile.columns

    def left(indices: Any, i: Any, j: Any, at: Any, group: int) -> Any:
        row = indices[0][lax.div(at, deep)]
        return i * tile.height + group * tile.rows, row * p + lax.rem(at, deep) * DEPTH

    def span(indices: Any, i: Any, j: Any) -> Any:
        first = lax.div(j, across) * (count * deep)
        return first, first + count * deep

    walk = Walk(
        name="block_sparse_forward",
        grid=(x.shape[0] // tile.height, columns * across),
        span=span,
        a=left,
        b=lambda indices, i, j, at: (at * DEPTH, lax.rem(j, across) * tile.columns),
        out=lambda i, j, group, column: (i * tile.height + group * tile.rows, j * tile.columns + column),
    )
    flat, out = values.reshape(-1, s), (x.shape[0], columns * s)
    return walk_product(walk, tile, x, flat, [rows.reshape(-1)], out, chip.sms, interpret)[:m]


def backward_x(
    dy: jax.Array, values: jax.Array, rows: jax.Array, k: int, tile: Tile, chip: Chip, interpret: Any
) -> jax.Array:
    """dy (M, C s) -> dy W^T (M, k): the blocks are sorted by block row first, and a tile sums those of its row."""
    (_, count, p, s), m = values.shape, dy.shape[0]
    dy = whole_tiles(dy, tile.height)
    deep, across = s // DEPTH, p // tile.columns
    order = jnp.argsort(rows.reshape(-1), stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(rows.reshape(-1)[order], jnp.arange(k // p + 1)).astype(jnp.int32)

    def left(indices: Any, i: Any, j: Any, at: Any, group: int) -> Any:
        column = lax.div(indices[0][lax.div(at, deep)], count)
        return i * tile.height + group * tile.rows, column * s + lax.rem(at, deep) * DEPTH

    def right(indices: Any, i: Any, j: Any, at: Any) -> Any:
        block = indices[0][lax.div(at, deep)]
        return block * p + lax.rem(j, across) * tile.columns, lax.rem(at, deep) * DEPTH

    def span(indices: Any, i: Any, j: Any) -> Any:
        row = lax.div(j, across)
        return indices[1][row] * deep, indices[1][row + 1] * deep

    walk = Walk(
        name="block_sparse_backward_x",
        grid=(dy.shape[0] // tile.height, k // tile.columns),
        span=span,
        a=left,
        b=right,
        out=lambda i, j, group, column: (i * tile.height + group * tile.rows, j * tile.columns + column),
        flip_b=True,
    )
    flat, out = values.reshape(-1, s), (dy.shape[0], k)
    return walk_product(walk, tile, dy, flat, [order, starts], out, chip.sms, interpret)[:m]


def backward_values(
    x: jax.Array, dy: jax.Array, rows: jax.Array, grid: Grid, tile: Tile, chip: Chip, interpret: Any
) -> jax.Array:
    """x (M, K), dy (M, C s) -> the entries of x^T dy on the support, (C, R, p, s) in the dtype of x."""
    columns, count, p, s = grid
    x, dy = (whole_tiles(a, DEPTH) for a in (x, dy))
    parts, each = p // tile.rows, count * p // tile.height

    def left(indices: Any, i: Any, j: Any, at: Any, group: int) -> Any:
        strip = i * tile.groups + group
        row = indices[0][lax.div(strip, parts)]
        return at * DEPTH, row * p + lax.rem(strip, parts) * tile.rows

    walk = Walk(
        name="block_sparse_backward_values",
        grid=(columns * each, s // tile.columns),
        span=lambda indices, i, j: (jnp.int32(0), jnp.int32(x.shape[0] // DEPTH)),
        a=left,
        b=lambda indices, i, j, at: (at * DEPTH, lax.div(i, each) * s + j * tile.columns),
        out=lambda i, j, group, column: (i * tile.height + group * tile.rows, j * tile.columns + column),
        flip_a=True,
    )
    out = columns * count * p, s
    return walk_product(walk, tile, x, dy, [rows.reshape(-1)], out, chip.sms, interpret).reshape(grid)


def unsupported(m: int, grid: Grid, dtype: Any, chip: Chip) -> str:
    """Why the kernels cannot run, or ""."""
    _, _, p, s = grid
    if said := refused(m, dtype, chip):
        return said
    return f"blocks {p} x {s} are not multiples of {DEPTH}" if p % DEPTH or s % DEPTH else ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any = None) -> jax.Array:
    """The kernel and its gradients, all three kernels: x (M, K), values (C, R, p, s) in bfloat16, rows int32 (C, R)."""
    return forward(x, values, rows, tile_of("forward", chip, *x.shape, values.shape), chip, interpret)


def _forward(x: jax.Array, values: jax.Array, rows: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    return product(x, values, rows, chip, interpret), (x, values, rows)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, values, rows = kept
    (m, k), grid = x.shape, values.shape
    dx = backward_x(dy, values, rows, k, tile_of("backward_x", chip, m, k, grid), chip, interpret)
    tile = tile_of("backward_values", chip, m, k, grid)
    return dx, backward_values(x, dy, rows, grid, tile, chip, interpret), None


product.defvjp(_forward, _backward)
