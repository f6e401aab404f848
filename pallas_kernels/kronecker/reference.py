"""The definition of the product with a sum of Kronecker products, in f32 or wider, by the dense matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dense_matrix(a: jax.Array, b: jax.Array) -> jax.Array:
    """W (n1 n2, m1 m2), the sum over terms of a_t kron b_t; a (terms, n1, m1), b (terms, n2, m2)."""
    (_, n1, m1), (_, n2, m2) = a.shape, b.shape
    return jnp.einsum("tia,tjb->ijab", a, b, precision="highest").reshape(n1 * n2, m1 * m2)


def reference(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (M, n1 n2) @ W in f32 or wider, cast to the dtype of the operands."""
    dtype = jnp.result_type(x, a, b)
    wide = jnp.promote_types(dtype, jnp.float32)
    w = dense_matrix(a.astype(wide), b.astype(wide))
    return jnp.dot(x.astype(wide), w, precision="highest").astype(dtype)
