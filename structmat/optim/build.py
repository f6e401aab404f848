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
    "sgd": lambda s: optax.trace(decay=s["b1"]),
    "sgd_nesterov": lambda s: optax.trace(decay=s["b1"], nesterov=True),
}
SGD = ("sgd", "sgd_nesterov")
"""The only ones whose steps grow with the gradient, which the multipliers of mup do not allow for."""

SCHEDULES = {
    "cosine": lambda s, warmup, total: optax.warmup_cosine_decay_schedule(0.0, s["lr"], warmup, total),
    "constant": lambda s, warmup, total: _after_warmup(s, warmup, optax.constant_schedule(s["lr"])),
    "linear": lambda s, warmup, total: _after_warmup(s, warmup, optax.linear_schedule(s["lr"], 0.0, total - warmup)),
    "steps": lambda s, warmup, total: _after_warmup(
        s,
        warmup,
        optax.piecewise_constant_schedule(s["lr"], {round(at * total) - warmup: 0.1 for at in drops(s["drops"])}),
    ),
}


def _after_warmup(spec: Mapping[str, Any], warmup: int, then: optax.Schedule) -> optax.Schedule:
    if not warmup:
        return then
    return optax.join_schedules([optax.linear_schedule(0.0, spec["lr"], warmup), then], [warmup])


def drops(text: str) -> list[float]:
    """The fractions of a run at which schedule `steps` divides the rate by ten, out of `0.5, 0.75`.

    Raises:
      ValueError: not ascending numbers in (0, 1).
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or found != sorted(set(found)) or not 0 < found[0] <= found[-1] < 1:
        raise ValueError("must be ascending fractions of the run, such as '0.5, 0.75'")
    return found


def make_schedule(spec: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by step: `spec.warmup` steps up from 0 (a fraction of the run if below 1), then `spec.schedule`."""
    warmup = spec["warmup"]
    warmup = int(warmup * total_steps) if 0 < warmup < 1 else int(warmup)
    if spec["schedule"] not in SCHEDULES:
        raise ValueError(f"optim.schedule {spec['schedule']!r} is unknown" + suggest(spec["schedule"], SCHEDULES))
    if warmup >= total_steps:
        raise ValueError(f"optim.warmup={warmup} steps must be below steps={total_steps}")
    return SCHEDULES[spec["schedule"]](spec, warmup, total_steps)


def make_optimizer(
    spec: Mapping[str, Any], multipliers: Any, mask: Any, total_steps: int
) -> optax.GradientTransformation:
    """Clip, precondition, scale by the structure-aware multipliers, decay, learning rate.

    Decay is decoupled and acts at the plain rate, whatever the multiplier: factors with a small fan-in would
    otherwise be decayed many times faster than the dense weight they stand for. Only for SGD it is a part of the gradient,
    as in the papers that train by it.

    Args:
      spec: name, lr, schedule, drops, warmup, weight_decay, b1, b2, eps, clip (0: none).
      multipliers: tree of floats like the parameters, or None for 1 everywhere.
      mask: tree of bools, where weight decay acts.
      total_steps: length of the schedule.

    Raises:
      ValueError: unknown names, a warm-up of the whole run, or multipliers with SGD.
    """
    if spec["name"] not in OPTIMIZERS:
        raise ValueError(f"optim.name {spec['name']!r} is unknown" + suggest(spec["name"], OPTIMIZERS))
    links = [optax.clip_by_global_norm(spec["clip"])] if spec["clip"] else []
    decay = [optax.add_decayed_weights(spec["weight_decay"], mask)] if spec["weight_decay"] else []
    own = OPTIMIZERS[spec["name"]](spec)
    if spec["name"] in SGD:
        if multipliers is not None:
            raise ValueError(f"optim.name {spec['name']!r} takes no multipliers: its steps grow with the gradient")
        links += [*decay, own]
    else:
        links += [own, *([] if multipliers is None else [scale_by_tree(multipliers)]), *decay]
    return optax.chain(*links, optax.scale_by_learning_rate(make_schedule(spec, total_steps)))
