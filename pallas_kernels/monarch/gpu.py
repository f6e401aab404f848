"""The two-stage product on Hopper: two batched products, the first of which stores its sums where the second reads them.

Keeping the middle Z on chip, as on TPU, does not pay there: every output block would read all of x again for its own r
columns of Z, at n = 4096 and 8 blocks a tile of 128 x 64, for which the loads take three times the multiplications (at
32 bytes a cycle from L2), and room for all columns of Z there is none from n = 2048 on. So Z (M, l k r) goes through
memory once each way, already in the order of the second stage: XLA's two transposes fall away. The gradient keeps Z.
Lowered and run in interpret mode only: no time or number of it was taken on a GPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chips import Chip
from pallas_kernels.hopper import Walk, walk_product
from pallas_kernels.hopper_tiles import DEPTH, Tile, best, candidates, refused, whole
from pallas_kernels.tiling import whole_tiles


def stage_tile(chip: Chip, m: int, blocks: int, out: int, run: int) -> Tile:
    """The tile of `stage`; one divides every `out` of a multiple of 64."""
    fits = [t for t in candidates(math.gcd(run, DEPTH), chip.vmem) if out % t.columns == 0]
    return best([(t, whole(m, t) // t.height * blocks * (out // t.columns)) for t in fits], chip.sms)


def stage(x: jax.Array, weights: jax.Array, flip: bool, run: int, chip: Chip, interpret: Any) -> jax.Array:
    """x (M, b d), weights (b, d, e) -> the b products (M, e), stored in runs: columns (e / run, b, run) of one matrix.

    `flip`: weights (b, e, d) are taken transposed. Runs of e columns keep every product together.
    """
    (blocks, *_), m = weights.shape, x.shape[0]
    depth, out = weights.shape[2:0:-1] if flip else weights.shape[1:]
    tile = stage_tile(chip, m, blocks, out, run)
    x = whole_tiles(x, tile.height)
    deep, across = depth // DEPTH, out // tile.columns

    def right(indices: Any, i: Any, j: Any, at: Any) -> Any:
        block, column = lax.div(j, across), lax.rem(j, across) * tile.columns
        return (block * out + column, at * DEPTH) if flip else (block * depth + at * DEPTH, column)

    def place(i: Any, j: Any, group: Any, column: int) -> Any:
        block, column = lax.div(j, across), lax.rem(j, across) * tile.columns + column
        first = lax.div(column, run) * (blocks * run) + block * run + lax.rem(column, run)
        return i * tile.height + group * tile.rows, first

    walk = Walk(
        name="monarch_stage_transposed" if flip else "monarch_stage",
        grid=(x.shape[0] // tile.height, blocks * across),
        span=lambda indices, i, j: (jnp.int32(0), jnp.int32(deep)),
        a=lambda indices, i, j, at, group: (
            i * tile.height + group * tile.rows,
            lax.div(j, across) * depth + at * DEPTH,
        ),
        b=right,
        out=place,
        flip_b=flip,
    )
    flat, shape = weights.reshape(-1, weights.shape[2]), (x.shape[0], blocks * out)
    return walk_product(walk, tile, x, flat, [], shape, chip.sms, interpret)[:m]


def weights_tile(chip: Chip, blocks: int, depth: int, out: int) -> Tile:
    """The tile of `stage_weights`; one divides all multiples of 64."""
    fits = [t for t in candidates(DEPTH, chip.vmem) if not (depth % t.height or out % t.columns)]
    return best([(t, blocks * (depth // t.height) * (out // t.columns)) for t in fits], chip.sms)


def stage_weights(x: jax.Array, dy: jax.Array, blocks: int, chip: Chip, interpret: Any) -> jax.Array:
    """x (M, b d), dy (M, b e) -> (b, d, e) in the dtype of x: block by block x^T dy."""
    depth, out = x.shape[1] // blocks, dy.shape[1] // blocks
    tile = weights_tile(chip, blocks, depth, out)
    x, dy = (whole_tiles(a, DEPTH) for a in (x, dy))
    each = depth // tile.height
    walk = Walk(
        name="monarch_weights",
        grid=(blocks * each, out // tile.columns),
        span=lambda indices, i, j: (jnp.int32(0), jnp.int32(x.shape[0] // DEPTH)),
        a=lambda indices, i, j, at, group: (at * DEPTH, i * tile.height + group * tile.rows),
        b=lambda indices, i, j, at: (at * DEPTH, lax.div(i, each) * out + j * tile.columns),
        out=lambda i, j, group, column: (i * tile.height + group * tile.rows, j * tile.columns + column),
        flip_a=True,
    )
    y = walk_product(walk, tile, x, dy, [], (blocks * depth, out), chip.sms, interpret)
    return y.reshape(blocks, depth, out)


def unsupported(m: int, sizes: tuple[int, int, int, int, int], dtype: Any, chip: Chip) -> str:
    """Why the kernels cannot run at sizes (k, p, l, s, r), or ""."""
    k, p, l, s, r = sizes
    if said := refused(m, dtype, chip):
        return said
    if r % 16:
        return f"slice rank {r} is not a multiple of 16"
    widths = {"p": p, "s": s, "k r": k * r, "l r": l * r}
    return next(
        (f"{name} = {width} is not a multiple of {DEPTH}" for name, width in widths.items() if width % DEPTH), ""
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, right: jax.Array, left: jax.Array, chip: Chip, interpret: Any = None) -> jax.Array:
    """The kernels and their gradients, kernels too: x (M, k p), right (k, p, l r), left (l, k r, s) bfloat16 -> (M, l s)."""
    return _forward(x, right, left, chip, interpret)[0]


def _forward(x: jax.Array, right: jax.Array, left: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    rank, width = left.shape[1] // right.shape[0], left.shape[2]
    z = stage(x, right, False, rank, chip, interpret)
    return stage(z, left, False, width, chip, interpret), (x, z, right, left)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, z, right, left = kept
    (k, p, _), l = right.shape, left.shape[0]
    dz = stage(dy, left, True, left.shape[1] // k, chip, interpret)
    dx = stage(dz, right, True, p, chip, interpret)
    dright = stage_weights(x, dz, k, chip, interpret)
    return dx, dright, stage_weights(z, dy, l, chip, interpret)


product.defvjp(_forward, _backward)
