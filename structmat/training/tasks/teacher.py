"""Regression on a random network, one pass over endless data: what scaling laws are measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.data import teacher
from structmat.training.applied import applied, with_auxiliary
from structmat.training.errors import ConfigError
from structmat.training.task import Batch, Source, Task, Variables
from structmat.training.tasks.mlp_model import mlp_choice

MODELS = {"mlp": mlp_choice(1, layers=3)}
"""Its single output is the prediction."""


def defaults(model: str = "mlp") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            seed=0,  # of the network that is learned
            inputs=8,
            width=256,  # of its layers
            depth=6,  # its layers
        ),
    )


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    MODELS[config.model.name].check(config)
    for name, least in (("seed", 0), ("inputs", 1), ("width", 1), ("depth", 2)):
        if config.data[name] < least:
            raise ConfigError(f"data.{name}", config.data[name], f"must be at least {least}", f"{least} is")


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    choice = MODELS[config.model.name]
    x = jax.ShapeDtypeStruct((config.batch, config.data.inputs), jnp.float32)
    return Task(
        name="teacher",
        model=choice.build(config),
        base=choice.base(config),
        example=(x,),
        batch={"x": x, "y": jax.ShapeDtypeStruct((config.batch,), jnp.float32)},
        loss=loss,
        metric="mse",
        unit="point",
        units=config.batch,
        other_flops=0,
        load=lambda: load(config),
    )


def loss(
    model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error, which is the fraction of the target's variance; points whose target is NaN do not count."""
    here = jnp.isfinite(batch["y"])
    out, extra = applied(model, variables, batch["x"], rng, train)
    found = out[..., 0]
    count = here.sum().astype(jnp.float32)
    value = jnp.where(here, jnp.square(found - jnp.where(here, batch["y"], 0)), 0).sum() / count
    return with_auxiliary(value, {"loss": value, "mse": value, "count": count}, extra)


def load(config: Any) -> Source:
    """The network to learn, and its held-out points."""
    d = config.data
    network = teacher.load(d.seed, d.inputs, d.width, d.depth)
    return Source(
        batch=lambda step, rows=None: teacher.teacher_batch(network, config.seed, step, config.batch, rows),
        heldout=lambda: _heldout(network, d.seed, config.batch, config.eval.batches or None),
        sha256=network.sha256,
        description=network.description,
        reference={"mean": 1.0},
    )


def _heldout(network: teacher.Teacher, seed: int, batch: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, the last filled up with points whose target is NaN."""
    whole = teacher.heldout_set(network, seed)
    for number, start in enumerate(range(0, teacher.HELDOUT, batch)):
        if number == limit:
            return
        x, y = whole["x"][start : start + batch], whole["y"][start : start + batch]
        short = batch - len(y)
        yield {"x": np.pad(x, ((0, short), (0, 0))), "y": np.pad(y, (0, short), constant_values=np.nan)}
