"""The definition of the two-stage product, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_matrix(right: jax.Array, left: jax.Array) -> jax.Array:
    """W (k p, l s) of right (k, p, l, r) and left (l, k, r, s): every slice [p, s] of block pair (k, l) has rank r."""
    (k, p, l, _), s = right.shape, left.shape[3]
    return jnp.einsum("kplr,lkrs->kpls", right, left, precision="highest").reshape(k * p, l * s)


def reference(x: jax.Array, right: jax.Array, left: jax.Array) -> jax.Array:
    """x (M, k p) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, right, left)
    wide = jnp.promote_types(dtype, jnp.float32)
    w = dense_matrix(right.astype(wide), left.astype(wide))
    return jnp.dot(x.astype(wide), w, precision="highest").astype(dtype)
