"""Rotary positions (Su et al. 2021, "RoFormer"), in the layout of LLaMA's released weights in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, start: jax.Array | int, theta: float = 10000.0) -> jax.Array:
    """Turn each head's pairs (i, i + size/2) of token t by the angle (start + t) theta^(-2i/size).

    Args:
      x: `(batch, length, heads, size)`, size even. start: position of the first token.

    Returns:
      The same shape and dtype; angles and products are f32.

    Raises:
      ValueError: the head size is odd.
    """
    length, size = x.shape[1], x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary positions need an even head size, got {size}")
    rates = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = (start + jnp.arange(length))[:, None].astype(jnp.float32) * rates
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
