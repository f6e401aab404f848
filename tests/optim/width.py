"""RMS of the feature update after one optimiser step, over widths and structures."""

import jax
import jax.numpy as jnp

from structmat.optim import leaf_multiplier
from structmat.structures import parse
from structmat.structures.leaf import map_leaves

BASE = 64
LR = 1e-3


def feature_update(text: str, width: int, aware: bool = True, rows: int = 4, seed: int = 0) -> float:
    """RMS of (W' - W) x, W' one Adam step (a sign) from W at base width 64, in units of the learning rate."""
    bound = parse(text).bind(width, width)
    leaves = bound.leaves()

    @jax.jit
    def update(key):
        kw, kx, kg = jax.random.split(key, 3)
        params = bound.init(kw)
        x = jax.nn.relu(jax.random.normal(kx, (rows, width))) * 2**0.5  # a hidden layer's input, RMS 1
        g = jax.random.normal(kg, (rows, width))

        def loss(trained):
            merged = map_leaves(lambda leaf, t, p: t if leaf.trainable else p, leaves, trained, params)
            y = bound.matmul(merged, x)
            return jnp.sum(y * g), y

        (_, before), grads = jax.value_and_grad(loss, has_aux=True, allow_int=True)(params)

        def step(leaf, p, dp):
            if not leaf.trainable:
                return p
            factor = leaf_multiplier(leaf, "linear", BASE) if aware else BASE / width
            return p - LR * factor * jnp.sign(dp)

        change = bound.matmul(map_leaves(step, leaves, params, grads), x) - before
        return jnp.sqrt(jnp.mean(change**2)) / LR

    return float(update(jax.random.key(seed)))
