"""What an optimiser is told of parameters that are new in the middle of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from structmat.optim.adam8bit import pack

MOMENTS: dict[str, dict[str, str | None]] = {
    "adamw": {"mu": None, "nu": "b2"},
    "adamw_8bit": {"mu": None, "nu": "b2"},
    "lion": {"mu": None},
    "sgd": {"trace": None},
    "sgd_nesterov": {"trace": None},
}
"""Optimiser -> field it keeps of every parameter -> None for an average of gradients, or the decay of one of squares."""


def needs_gradient(spec: Mapping[str, Any]) -> bool:
    """Whether `restart` reads the gradient: only averages of squares do."""
    return any(MOMENTS[spec["name"]].values())


def restart(spec: Mapping[str, Any], grads: Any, count: jax.Array | int) -> dict[str, Any]:
    """Moments to begin with at the optimiser's update `count`, which goes on.

    Averages of gradients are zero: no direction is remembered. Averages of squares are what `count` updates with this one
    gradient would have left, (1 - b2^count) |g|^2, clipped as the chain clips it and 0 where it is not finite; so the
    bias correction of the kept count is right. On a digits model that goes from Monarch to dense the largest of the first
    ten steps is then 1.2 times the usual size, for b2=0.95 and 0.999. All zeros make it 2.1 and 3.9 times, a count begun
    anew 4.2 and 1.9, and averages of gradients that begin at g too, as if there were no noise, 4.2 at b2=0.95
    (`tests/optim/test_restart.py`).

    Args:
      spec: `config.optim`.
      grads: of one batch at the new parameters, a tree like these (complex ones as the step passes them on).

    Returns:
      Field of the state -> tree like `grads`, of the dtypes the optimiser keeps.
    """
    clip = optax.clip_by_global_norm(spec["clip"]) if spec["clip"] else optax.identity()
    grads, _ = clip.update(grads, clip.init(grads))

    def squares(g: jax.Array, decay: float) -> jax.Array:
        square = jnp.square(jnp.abs(g))
        return ((1 - decay**count) * jnp.where(jnp.isfinite(square), square, 0)).astype(g.dtype)

    fill = lambda decay: jax.tree.map(jnp.zeros_like if decay is None else lambda g: squares(g, spec[decay]), grads)
    found = {field: fill(decay) for field, decay in MOMENTS[spec["name"]].items()}
    if spec["name"] == "adamw_8bit":
        parts = jax.tree.map(pack, found["mu"], found["nu"])
        names = ("mu", "nu", "mu_scale", "nu_scale")
        found = {name: jax.tree.map(lambda _, p, i=i: p[i], grads, parts) for i, name in enumerate(names)}
    return found
