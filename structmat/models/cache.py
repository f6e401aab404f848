"""The key-value cache of autoregressive decoding, as variables of the module that attends."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def advance(module: nn.Module, length: int, name: str = "index") -> jax.Array:
    """int32 (): how many tokens the module's `cache` has seen; the next call starts `length` later."""
    index = module.variable("cache", name, jnp.zeros, (), jnp.int32)
    start = index.value
    if not module.is_initializing():
        index.value = start + length
    return start


def append(
    module: nn.Module, k: jax.Array, v: jax.Array, start: jax.Array, context: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write keys and values `(batch, length, heads, head size)` at `start` of the module's `cache`.

    Returns:
      All keys and values `(batch, context, heads, head size)`, and the mask `(1, 1, length, context)` of what each new
      token may see.
    """
    batch, length, heads, size = k.shape
    shape = (batch, context, heads, size)
    keys = module.variable("cache", "keys", jnp.zeros, shape, k.dtype)
    values = module.variable("cache", "values", jnp.zeros, shape, v.dtype)
    if not module.is_initializing():
        keys.value = jax.lax.dynamic_update_slice(keys.value, k, (0, start, 0, 0))
        values.value = jax.lax.dynamic_update_slice(values.value, v, (0, start, 0, 0))
    mask = jnp.arange(context)[None, :] <= start + jnp.arange(length)[:, None]
    return keys.value, values.value, mask[None, None]
