"""From an optimiser spec to an optax chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from structmat.optim.adam8bit import scale_by_adam_8bit
from structmat.optim.mup import scale_by_tree
from structmat.structures.errors import suggest

OPTIMIZERS = {
    "adamw": lambda s: optax.scale_by_adam(b1=s["b1"], b2=s["b2"], eps=s["eps"]),
    "adamw_8bit": lambda s: scale_by_adam_8bit(b1=s["b1"], b2=s["b2"], eps=s["eps"]),
    "lion": lambda s: optax.scale_by_lion(b1=s["b1"], b2=s["b2"]),
}
"""All take steps of a size that does not depend on the gradient's, which the multipliers of mup assume."""

SCHEDULES = {
    "cosine": lambda lr, warmup, total: optax.warmup_cosine_decay_schedule(0.0, lr, warmup, total),
    "constant": lambda lr, warmup, total: optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), optax.constant_schedule(lr)], [warmup]
    ),
    "linear": lambda lr, warmup, total: optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), optax.linear_schedule(lr, 0.0, total - warmup)], [warmup]
    ),
}


def make_schedule(spec: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by step: `spec.warmup` steps up from 0 (a fraction of the run if below 1), then `spec.schedule`."""
    warmup = spec["warmup"]
    warmup = int(warmup * total_steps) if 0 < warmup < 1 else int(warmup)
    if spec["schedule"] not in SCHEDULES:
        raise ValueError(f"optim.schedule {spec['schedule']!r} is unknown" + suggest(spec["schedule"], SCHEDULES))
    if warmup >= total_steps:
        raise ValueError(f"optim.warmup={warmup} steps must be below steps={total_steps}")
    return SCHEDULES[spec["schedule"]](spec["lr"], warmup, total_steps)


def make_optimizer(
    spec: Mapping[str, Any], multipliers: Any, mask: Any, total_steps: int
) -> optax.GradientTransformation:
    """Clip, precondition, scale by the structure-aware multipliers, decay, learning rate.

    Decay is decoupled and acts at the plain rate, whatever the multiplier: factors with a small fan-in would
    otherwise be decayed many times faster than the dense weight they stand for.

    Args:
      spec: name, lr, schedule, warmup, weight_decay, b1, b2, eps, clip (0: none).
      multipliers: tree of floats like the parameters, or None for 1 everywhere.
      mask: tree of bools, where weight decay acts.
      total_steps: length of the schedule.
    """
    if spec["name"] not in OPTIMIZERS:
        raise ValueError(f"optim.name {spec['name']!r} is unknown" + suggest(spec["name"], OPTIMIZERS))
    links = [optax.clip_by_global_norm(spec["clip"])] if spec["clip"] else []
    links.append(OPTIMIZERS[spec["name"]](spec))
    if multipliers is not None:
        links.append(scale_by_tree(multipliers))
    if spec["weight_decay"]:
        links.append(optax.add_decayed_weights(spec["weight_decay"], mask))
    return optax.chain(*links, optax.scale_by_learning_rate(make_schedule(spec, total_steps)))
