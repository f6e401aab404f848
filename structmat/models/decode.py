"""Autoregressive sampling with a key-value cache."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def generate(
    model: nn.Module, variables: Any, prompt: jax.Array, length: int, key: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Continue `prompt` by `length` tokens.

    Args:
      model: called as `model(tokens, train, decode)` with a `cache` collection, as GPT.
      prompt: (batch, prompt length) int32, at least one token.
      temperature: 0 takes the most likely token.

    Returns:
      (batch, length) int32.

    Raises:
      ValueError: prompt and continuation do not fit the model's context, or temperature is negative.
    """
    if prompt.shape[1] < 1 or prompt.shape[1] + length > model.context:
        raise ValueError(f"a prompt of {prompt.shape[1]} and {length} new tokens do not fit context={model.context}")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    return _run(model, length, temperature, variables, jnp.asarray(prompt), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    model: nn.Module, length: int, temperature: float, variables: Any, prompt: jax.Array, key: jax.Array
) -> jax.Array:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), prompt[:, :1], False, True)["cache"])
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nn.unbox(shapes))

    def step(cache: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        logits, mutated = model.apply({**variables, "cache": cache}, tokens, False, True, mutable=["cache"])
        return mutated["cache"], logits[:, -1]

    def pick(key: jax.Array, logits: jax.Array) -> jax.Array:
        if temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def body(carry: tuple[Any, jax.Array], key: jax.Array) -> tuple[tuple[Any, jax.Array], jax.Array]:
        cache, logits = carry
        token = pick(key, logits)
        return step(cache, token[:, None]), token

    return jax.lax.scan(body, step(cache, prompt), jax.random.split(key, length))[1].T
