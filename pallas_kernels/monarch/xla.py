"""The two-stage product as two batched GEMMs round one transpose."""

from __future__ import annotations

import jax
from jax import lax


def two_stage(x: jax.Array, right: jax.Array, left: jax.Array) -> jax.Array:
    """x (M, k p), right (k, p, l, r), left (l, k, r, s) -> (M, l s)."""
    (k, p, l, r), s = right.shape, left.shape[3]
    blocks = x.reshape(-1, k, p)
    z = lax.dot_general(blocks, right.reshape(k, p, l * r), (((2,), (1,)), ((1,), (0,))))
    z = z.reshape(k, -1, l, r).transpose(2, 1, 0, 3).reshape(l, -1, k * r)
    y = lax.dot_general(z, left.reshape(l, k * r, s), (((2,), (1,)), ((0,), (0,))))
    return y.transpose(1, 0, 2).reshape(x.shape[0], l * s)
