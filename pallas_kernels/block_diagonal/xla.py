"""The block-diagonal product as one batched GEMM."""

from __future__ import annotations

import jax
from jax import lax


def batched(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """x (M, k p), blocks (k, p, s) -> (M, k s)."""
    k, p, s = blocks.shape
    y = lax.dot_general(x.reshape(-1, k, p), blocks, (((2,), (1,)), ((1,), (0,))))
    return y.transpose(1, 0, 2).reshape(x.shape[0], k * s)
