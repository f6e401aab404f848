"""The definition of the block-sparse product, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_matrix(values: jax.Array, rows: jax.Array, k: int) -> jax.Array:
    """W (k, C s) of values (C, R, p, s) and rows (C, R); blocks named twice add up."""
    columns, _, p, s = values.shape
    empty = jnp.zeros((columns, k // p, p, s), values.dtype)
    filled = empty.at[jnp.arange(columns)[:, None], rows].add(values)
    return filled.transpose(1, 2, 0, 3).reshape(k, columns * s)


def reference(x: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """x (M, K) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, values)
    wide = jnp.promote_types(dtype, jnp.float32)
    product = jnp.dot(x.astype(wide), dense_matrix(values.astype(wide), rows, x.shape[1]), precision="highest")
    return product.astype(dtype)
