"""The largest entries of an array, exactly as many as asked for, by counting alone.

The threshold is found by bisection over the bits of the scores, ties by bisection over positions: 64 sums over the array
and nothing else, so that an array spread over devices stays where it is (a sort would gather it), and the count may be
an array. The choice does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

MOST = 2**31 - 1
"""Entries that can be counted."""


def largest(score: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """Which are the `count` largest of the chosen entries.

    Args:
      score: real, any shape, not negative; NaN is above all.
      among: bool, same shape: the entries to choose from, at least `count` of them.
      count: int32 ().

    Returns:
      bool like `among`, `count` entries; of equal scores those at lower row-major positions.
    """
    bits = lax.bitcast_convert_type(jnp.abs(score).astype(jnp.float32), jnp.uint32)
    return highest(bits, among, count)


def highest(rank: jax.Array, among: jax.Array, count: jax.Array | int) -> jax.Array:
    """As `largest`, of ranks uint32 below 2^32 - 1."""
    count = jnp.asarray(count, jnp.int32)
    rank = jnp.where(among, rank + 1, 0)
    position = _positions(rank.shape)
    edge = _bisect(lambda t: _count(rank >= t) >= count)  # out of reach where count is 0
    above, tied = rank > edge, rank == edge
    missing = count - _count(above)
    last = _bisect(lambda p: _count(tied & (position < p)) <= missing)
    return above | (tied & (position < last))


def _bisect(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest uint32 for which `holds`, which is true at 0 and false from some value on."""

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(higher), higher, found)

    return lax.fori_loop(0, 32, step, jnp.uint32(0))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """uint32 row-major position of every entry."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return position
