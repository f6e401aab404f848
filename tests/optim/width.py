"""RMS of the feature update after one optimiser step, over widths and structures."""

import jax
import jax.numpy as jnp

from structmat.optim import leaf_multiplier
from structmat.structures import parse
from structmat.structures.base import map_leaves

BASE = 64
LR = 1e-3


def feature_update(text: str, width: int, aware: bool = True, rows: int = 4, seed: int = 0) -> float:
    """RMS of (W' - W) x, W' one Adam step (a sign) from W at base width 64, in units of the learning rate."""
    bound = parse(text).bind(width, width)
    kw, kx, kg = jax.random.split(jax.random.key(seed), 3)
    params = bound.init(kw)
    x = jax.nn.relu(jax.random.normal(kx, (rows, width))) * 2**0.5  # a hidden layer's input, RMS 1
    g = jax.random.normal(kg, (rows, width))
    leaves = bound.leaves()

    def loss(trained):
        merged = map_leaves(lambda leaf, t, p: t if leaf.trainable else p, leaves, trained, params)
        return jnp.sum(bound.matmul(merged, x) * g)

    grads = jax.jit(jax.grad(loss, allow_int=True))(params)

    def step(leaf, p, dp):
        if not leaf.trainable:
            return p
        factor = leaf_multiplier(leaf, "linear", BASE) if aware else BASE / width
        return p - LR * factor * jnp.sign(dp)

    new = map_leaves(step, leaves, params, grads)
    change = bound.matmul(new, x) - bound.matmul(params, x)
    return float(jnp.sqrt(jnp.mean(change**2)) / LR)
