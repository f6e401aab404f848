"""Where a point is, as channels: what commutes with shifts cannot know it otherwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def with_coordinates(x: jax.Array) -> jax.Array:
    """x `(batch, *space, channels)` and, as further channels, i / n along each axis."""
    space = x.shape[1:-1]
    each = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) / n for n in space), indexing="ij")
    grid = jnp.broadcast_to(jnp.stack(each, -1), (len(x), *space, len(space)))
    return jnp.concatenate([x, grid.astype(x.dtype)], -1)
