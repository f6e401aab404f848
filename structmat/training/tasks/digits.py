"""Image classification on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.data import digits
from structmat.training.task import Source, Task
from structmat.training.tasks.classification import heldout, loss, majority
from structmat.training.tasks.mlp_model import mlp_choice

PIXELS, CLASSES = 64, 10


MODELS = {"mlp": mlp_choice(CLASSES, layers=2)}


def defaults(model: str = "mlp") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(model=dict(name=model, **MODELS[model].fields), data=dict())


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    MODELS[config.model.name].check(config)


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    choice = MODELS[config.model.name]
    images = jax.ShapeDtypeStruct((config.batch, PIXELS), jnp.float32)
    return Task(
        name="digits",
        model=choice.build(config),
        base=choice.base(config),
        example=(images,),
        batch={"images": images, "labels": jax.ShapeDtypeStruct((config.batch,), jnp.int32)},
        loss=loss,
        metric="accuracy",
        unit="image",
        units=config.batch,
        other_flops=0,
        load=lambda: load(config),
    )


def load(config: Any) -> Source:
    """Read the images."""
    data = digits.load()
    return Source(
        batch=lambda step, rows=None: digits.digits_batch(config.seed, step, config.batch, rows),
        heldout=lambda: _heldout(config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description,
        reference=majority(data.test_labels),
    )


def _heldout(batch: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    whole = digits.heldout_set()
    return heldout(lambda part: whole["images"][part], whole["labels"], batch, limit)
