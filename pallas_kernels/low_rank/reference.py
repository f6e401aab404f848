"""The definition of the low-rank product, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_matrix(a: jax.Array, b: jax.Array) -> jax.Array:
    """W (n, m) of a (r, n) and b (r, m)."""
    return jnp.dot(a.T, b, precision="highest")


def reference(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (M, n) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    w = dense_matrix(a.astype(wide), b.astype(wide))
    return jnp.dot(x.astype(wide), w, precision="highest").astype(dtype)
