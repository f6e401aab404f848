"""One pass of radix-2 butterfly stages: its product, its dense matrix, its rows and its transpose.

A pass over n = 2^S coordinates is S stages. The stage of stride s mixes the coordinates (h, b, l), b in {0, 1}, l < s,
in pairs: y[h, c, l] = sum_b x[h, b, l] t[b, c, (h, l)], with one 2x2 block for each of the n/2 pairs, blocks in the
last dimension so that it fills vector lanes. Strides run 1, 2, ..., n/2 (increasing) or back. From a coordinate of the
input to one of the output there is exactly one path, so an entry of the pass, or of any run of its stages, is a plain
product of S block entries: merging stages needs multiplications only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MERGED = 4
"""Stages merged into one batched GEMM of blocks 2^MERGED: radix 16 was the fastest of 4 to 64 on CPU, n = 1024, 4096."""
MERGE_ROWS = 32
"""Fewer rows than this do not pay for merging and go stage by stage: measured on CPU, n = 1024, 4096, with gradients."""

Twiddles = list[jax.Array]
Passes = list[Twiddles]
"""Passes in order of application; every second one has its strides in the other order."""


def transposed(twiddles: Twiddles) -> Twiddles:
    """The stages of the transposed pass, whose strides run the other way."""
    return [t.swapaxes(0, 1) for t in reversed(twiddles)]


def strides(count: int, increasing: bool) -> list[int]:
    """Stride of each stage of a pass in order of application."""
    up = [2**k for k in range(count)]
    return up if increasing else up[::-1]


def multiply(passes: Passes, x: jax.Array, increasing: bool) -> jax.Array:
    """x (rows, n) times all passes, the first of which is increasing or not."""
    for index, twiddles in enumerate(passes):
        x = _multiply_pass(twiddles, x, increasing ^ (index % 2 == 1))
    return x


def _multiply_pass(twiddles: Twiddles, x: jax.Array, increasing: bool) -> jax.Array:
    steps = strides(len(twiddles), increasing)
    if x.shape[0] < MERGE_ROWS:
        for t, stride in zip(twiddles, steps):
            x = _stage(x, t, stride)
        return x
    first = 0
    for count in _groups(len(twiddles)):
        group, least = twiddles[first : first + count], min(steps[first : first + count])
        x = _blocks_product(x, merge(group, least, increasing))
        first += count
    return x


def multiply_flops(rows: int, stages: int, depth: int) -> int:
    """FLOPs of `multiply`: 4 multiplications a pair and stage, or the merging and the batched GEMMs."""
    n = 2**stages
    if rows < MERGE_ROWS:
        return 2 * rows * n * stages * depth
    return depth * sum(merge_flops(n, count) + 2 * rows * n * 2**count for count in _groups(stages))


def merge(twiddles: Twiddles, least: int, increasing: bool = True) -> jax.Array:
    """Blocks (in, out, h, l) of size p = 2^len(twiddles) that act on the coordinates (h, p, l), l < `least`.

    No array here has more than six dimensions: the gradient's multiply-and-reduce over seven crashes XLA's CPU backend
    (jaxlib 0.10).
    """
    if not increasing:
        return merge(transposed(twiddles), least).swapaxes(0, 1)
    blocks = twiddles[0].reshape(2, 2, -1, least)
    for k, t in enumerate(twiddles[1:], 1):
        p = 2**k
        below = blocks.reshape(p, p, -1, 2, least).transpose(3, 0, 1, 2, 4)[:, :, None]
        above = t.reshape(2, 2, -1, p, least).transpose(0, 1, 3, 2, 4)[:, None]
        blocks = (below * above).reshape(2 * p, 2 * p, -1, least)
    return blocks


def merge_flops(n: int, stages: int) -> int:
    """FLOPs of `merge`: the size of every intermediate product."""
    return sum(n * 2 ** (k + 1) for k in range(1, stages))


def dense(passes: Passes, increasing: bool) -> jax.Array:
    """The matrix (n, n) of all passes."""
    n = 2 ** len(passes[0])
    first = merge(passes[0], 1, increasing).reshape(n, n)
    return multiply(passes[1:], first, not increasing)


def rows_of_pass(twiddles: Twiddles, ids: jax.Array, increasing: bool) -> jax.Array:
    """Rows `ids` (count,) of one pass: (count, n), by doubling; the last stage takes n multiplications a row."""
    row = jnp.ones((ids.shape[0], 1, 1), twiddles[0].dtype)
    for t, stride in zip(twiddles, strides(len(twiddles), increasing)):
        bit, high, low = ids // stride % 2, ids // (2 * stride), ids % stride
        blocks = t.reshape(2, 2, -1, stride)
        if increasing:
            row = (row * blocks[bit, :, high]).reshape(ids.shape[0], 1, -1)
        else:
            row = (row * blocks[bit, :, :, low]).swapaxes(1, 2).reshape(ids.shape[0], 1, -1)
    return row.reshape(ids.shape[0], -1)


def scale_side(t: jax.Array, stride: int, scale: jax.Array, side: int) -> jax.Array:
    """The stage with its inputs (side 0) or its outputs (side 1) multiplied by `scale` (n,)."""
    paired = scale.reshape(-1, 2, stride).swapaxes(0, 1).reshape(2, -1)
    return t * jnp.expand_dims(paired, 1 - side)


def _groups(stages: int) -> list[int]:
    """Sizes of the runs of at most MERGED stages, as even as they can be."""
    count = -(-stages // MERGED)
    return [stages // count + (i < stages % count) for i in range(count)]


def _stage(x: jax.Array, t: jax.Array, stride: int) -> jax.Array:
    pairs = x.reshape(x.shape[0], -1, 2, stride)
    a, b = pairs[:, :, 0], pairs[:, :, 1]
    t = t.reshape(2, 2, -1, stride)
    return jnp.stack([a * t[0, 0] + b * t[1, 0], a * t[0, 1] + b * t[1, 1]], 2).reshape(x.shape)


def _blocks_product(x: jax.Array, blocks: jax.Array) -> jax.Array:
    p, _, high, low = blocks.shape
    x = x.reshape(-1, high, p, low).transpose(1, 3, 2, 0).reshape(high * low, p, -1)
    y = blocks.transpose(2, 3, 1, 0).reshape(high * low, p, p) @ x
    return y.reshape(high, low, p, -1).transpose(3, 0, 2, 1).reshape(-1, high * p * low)
