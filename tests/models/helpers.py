"""What the tests of several models share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def shaken(model: nn.Module, example: jax.Array) -> Any:
    """Variables drawn anew, f32, those that start at zero too; scales stay near 1."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example))
    near = lambda path: 1 if path[-1].key == "scale" else 0
    draw = lambda path, s: (near(path) + rng.normal(0, 0.4, s.shape)).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def decoded(model: nn.Module, held: Any, tokens: jax.Array, prompt: int = 5) -> tuple[jax.Array, Any]:
    """Logits `(batch, length, vocab)` of tokens given with the cache, the first `prompt` at once, and the last cache."""
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :1], False, True)))["cache"]
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    step = jax.jit(lambda c, t: model.apply(held | {"cache": c}, t, False, True, mutable=["cache"]))
    pieces = []
    for new in (tokens[:, :prompt], *jnp.split(tokens[:, prompt:], tokens.shape[1] - prompt, 1)):
        logits, mutated = step(cache, new)
        cache = mutated["cache"]
        pieces.append(logits)
    return jnp.concatenate(pieces, 1), cache
