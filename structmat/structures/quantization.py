"""Grouped quantisation: level grids, packed codes, and the scale that fits a group best.

A group x `(..., g)` is stored as g codes into a static ascending table of levels that contains 0, and one scale (and
perhaps one offset): x_i ~ scale * levels[code_i] + offset. Weights `(..., g)` or scalar weigh the squared errors.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Grid = Literal["int", "normal"]

TAIL = 0.9677083
"""Outermost quantile of the NormalFloat grid."""
SHRINK = np.linspace(0.4, 1, 25)
"""Fractions of the range from which `descent_fit` starts."""
REFITS = 20
"""Alternations of codes and scale at most after the best start."""


@functools.cache
def level_table(bits: int, grid: Grid) -> tuple[float, ...]:
    """The 2^bits levels, ascending: the integers -2^(bits-1) ... 2^(bits-1) - 1, or NormalFloat in -1 ... 1.

    NormalFloat (Dettmers et al. 2023, as in LQ-LoRA): normal quantiles at 2^(bits-1) points from 1 - TAIL to 1/2 and
    2^(bits-1) + 1 from 1/2 to TAIL, over the largest.
    """
    half = 2 ** (bits - 1)
    if grid == "int":
        return tuple(float(i) for i in range(-half, half))
    quantile = statistics.NormalDist().inv_cdf
    top = quantile(TAIL)
    left = [-quantile(p) / top for p in np.linspace(TAIL, 0.5, half)[:-1]]
    right = [quantile(p) / top for p in np.linspace(TAIL, 0.5, half + 1)[:-1]]
    return (*left, 0.0, *reversed(right))


# -- storage ---------------------------------------------------------------------------------------------------------


def word(bits: int) -> tuple[int, int]:
    """(bytes, codes) of the smallest whole number of bytes that holds a whole number of codes."""
    total = math.lcm(bits, 8)
    return total // 8, total // bits


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of `size` codes: whole words, the last padded."""
    octets, codes = word(bits)
    return -(-size // codes) * octets


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """codes `(..., size)` in 0 ... 2^bits - 1 -> uint8 `(..., packed_bytes)`, the first code in the lowest bits."""
    octets, count = word(bits)
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % count)]
    words = jnp.pad(codes, pad).reshape(*codes.shape[:-1], -1, count).astype(jnp.uint32)
    whole = jnp.sum(words << (bits * jnp.arange(count, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    split = (whole[..., None] >> (8 * jnp.arange(octets, dtype=jnp.uint32))) & 255
    return split.reshape(*codes.shape[:-1], -1).astype(jnp.uint8)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 `(..., bytes)` in whole words -> int32 codes `(..., codes)`, padding included."""
    octets, count = word(bits)
    split = packed.reshape(*packed.shape[:-1], -1, octets).astype(jnp.uint32)
    whole = jnp.sum(split << (8 * jnp.arange(octets, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    codes = (whole[..., None] >> (bits * jnp.arange(count, dtype=jnp.uint32))) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(jnp.int32)


def nearest_codes(x: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """Index of the nearest level to each entry."""
    middles = np.convolve(levels, [0.5, 0.5], "valid")
    return jnp.searchsorted(jnp.asarray(middles, x.dtype), x, method="scan_unrolled").astype(jnp.int32)


# -- fitting ---------------------------------------------------------------------------------------------------------


def optimal_fit(x: jax.Array, weights: jax.Array, levels: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """The scale `(...)` and codes `(..., g)` of least weighted squared error: the global optimum.

    Given its scale, the optimum's codes are the nearest levels. As 1/scale grows from 0, entries climb from level to
    level at known points (a midpoint of levels over |x_i|), and codes q allow an error |x|^2 - (x.q)^2 / q.q; sorting
    the points makes both products running sums, whose best prefix is the answer. Both signs of the scale are tried, as
    the levels are not symmetric. O(g L log(g L)) for L = levels / 2.
    """
    up, down = (_best_codes(sign * x, weights, levels) for sign in (1, -1))
    codes = jnp.where((up[0] >= down[0])[..., None], up[1], down[1])
    return least_squares(x, weights, codes, levels, affine=False)[0], codes


def _best_codes(x: jax.Array, weights: jax.Array, levels: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """What the best positive scale takes off the error `(...)`, and its codes."""
    points, *added = _climb(x, weights, levels)
    merged = [v.reshape(*x.shape[:-1], -1) for v in (points, *added)]
    at, along, square = lax.sort(merged, num_keys=1)
    gain = _ratio(jnp.cumsum(along, axis=-1) ** 2, jnp.cumsum(square, axis=-1))
    first = jnp.argmax(gain, axis=-1, keepdims=True)
    reached = (points <= jnp.take_along_axis(at, first, axis=-1)[..., None]) & jnp.isfinite(points)
    steps = jnp.sum(reached, axis=-1, dtype=jnp.int32)
    codes = levels.index(0.0) + jnp.where(x > 0, steps, -steps)
    return jnp.take_along_axis(gain, first, axis=-1)[..., 0], codes


def _climb(x: jax.Array, weights: jax.Array, levels: tuple[float, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per entry and level away from zero `(..., g, L)`: the 1/scale at which the entry reaches it, and what that adds
    to x.q and to q.q; unreachable levels are at infinity and add nothing."""
    up, down = [v for v in levels if v > 0], [-v for v in reversed(levels) if v < 0]
    most = max(len(up), len(down))

    def ladder(rungs: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.array([0.0, *rungs])
        fill = lambda v, value: np.concatenate([v, np.full(most - len(rungs), value)])
        return fill((at[1:] + at[:-1]) / 2, np.inf), fill(np.diff(at), 0), fill(np.diff(at**2), 0)

    size, positive = jnp.abs(x)[..., None], (x > 0)[..., None]
    pick = lambda pair: jnp.where(positive, *(jnp.asarray(v, x.dtype) for v in pair))
    middle, step, square = map(pick, zip(ladder(up), ladder(down)))
    points = jnp.where(size > 0, middle / jnp.where(size > 0, size, 1), jnp.inf)
    weights = jnp.broadcast_to(weights, x.shape)[..., None]
    reached = jnp.isfinite(points)
    return points, jnp.where(reached, weights * size * step, 0), jnp.where(reached, weights * square, 0)


def least_squares(
    x: jax.Array, weights: jax.Array, codes: jax.Array, levels: tuple[float, ...], affine: bool
) -> tuple[jax.Array, jax.Array]:
    """The best scale and offset `(...)` for given codes; the offset is 0 unless `affine`."""
    q = jnp.asarray(levels, x.dtype)[codes]
    weights = jnp.broadcast_to(weights, x.shape)
    total = jnp.sum(weights, axis=-1)
    mean = lambda v: _ratio(jnp.sum(weights * v, axis=-1), total) if affine else jnp.zeros_like(total)
    x_mean, q_mean = mean(x), mean(q)
    x, q = x - x_mean[..., None], q - q_mean[..., None]
    scale = _ratio(jnp.sum(weights * x * q, axis=-1), jnp.sum(weights * q * q, axis=-1))
    return scale, x_mean - scale * q_mean


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def descent_fit(
    x: jax.Array, weights: jax.Array, levels: tuple[float, ...], affine: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale, offset `(...)` and codes: nearest levels and least squares in turn, from the best of several ranges.

    The ranges are SHRINK times that of the group (its largest modulus unless `affine`), 1 being plain rounding; every
    step lowers the error of each group or leaves it, so none is worse than plain rounding. No optimum is proven.
    """

    def coded(scale: jax.Array, offset: jax.Array) -> tuple[jax.Array, ...]:
        safe = jnp.where(scale != 0, scale, 1)[..., None]
        codes = nearest_codes((x - offset[..., None]) / safe, levels)
        scale, offset = least_squares(x, weights, codes, levels, affine)
        left = x - scale[..., None] * jnp.asarray(levels, x.dtype)[codes] - offset[..., None]
        return jnp.sum(weights * left**2, axis=-1), scale, offset, codes

    def lower(new: tuple[jax.Array, ...], old: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        better = new[0] < old[0]
        pick = lambda a, b: jnp.where(better.reshape(better.shape + (1,) * (a.ndim - better.ndim)), a, b)
        return tuple(pick(a, b) for a, b in zip(new, old))

    if affine:
        low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)
        centre, width, level_centre = (low + high) / 2, levels[-1] - levels[0], (levels[0] + levels[-1]) / 2
    else:
        high = jnp.max(jnp.abs(x), axis=-1)
        low, centre, width, level_centre = -high, jnp.zeros_like(high), 2 * levels[-1], 0.0

    def start(fraction: jax.Array) -> tuple[jax.Array, ...]:
        scale = fraction * (high - low) / width
        return coded(scale, centre - scale * level_centre)

    try_range = lambda best, fraction: (lower(start(fraction), best), None)
    best, _ = lax.scan(try_range, start(jnp.ones((), x.dtype)), jnp.asarray(SHRINK[:-1], x.dtype))

    def refit(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, _, old = state
        new = lower(coded(*old[1:3]), old)
        return count + 1, jnp.any(new[0] < old[0]), new

    going = lambda state: (state[0] < REFITS) & state[1]
    _, scale, offset, codes = lax.while_loop(going, refit, (jnp.zeros((), jnp.int32), jnp.array(True), best))[2]
    return scale, offset, codes
