"""The definition of the product with low rank plus block sparse, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.reference import dense_matrix as dense_blocks


def dense_matrix(a: jax.Array, b: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """a^T b + S (K, C s) of a (r, K), b (r, C s), values (C, R, p, s) and rows (C, R)."""
    return jnp.dot(a.T, b, precision="highest") + dense_blocks(values, rows, a.shape[1])


def reference(x: jax.Array, a: jax.Array, b: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
    """x (M, K) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, a, b, values)
    wide = jnp.promote_types(dtype, jnp.float32)
    w = dense_matrix(a.astype(wide), b.astype(wide), values.astype(wide), rows)
    return jnp.dot(x.astype(wide), w, precision="highest").astype(dtype)
