"""The definition of the block-diagonal product, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_matrix(blocks: jax.Array) -> jax.Array:
    """W (k p, k s) of blocks (k, p, s)."""
    k, p, s = blocks.shape
    at = jnp.arange(k)
    grid = jnp.zeros((k, k, p, s), blocks.dtype).at[at, at].set(blocks)
    return grid.transpose(0, 2, 1, 3).reshape(k * p, k * s)


def reference(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x (M, k p) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, blocks)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.dot(x.astype(wide), dense_matrix(blocks.astype(wide)), precision="highest").astype(dtype)
