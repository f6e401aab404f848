"""Image classification on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from structmat.data import digits
from structmat.models import MLP
from structmat.training.model_choice import ModelChoice, at_least_one
from structmat.training.task import Batch, Source, Task, Variables

PIXELS, CLASSES = 64, 10
PADDING = -1
"""Label of rows that only fill up a batch."""


def build_mlp(config: Any) -> MLP:
    """The module."""
    m = config.model
    return MLP(CLASSES, m.width, m.layers, m.dropout, dtype=jnp.dtype(m.dtype))


MODELS = {
    "mlp": ModelChoice(
        fields=dict(
            layers=2,  # hidden layers
            width=128,
            dropout=0.0,
            dtype="float32",  # compute dtype; parameters stay float32
        ),
        check=lambda config: at_least_one(config.model, ("layers", "width")),
        build=build_mlp,
        base=lambda config: build_mlp(config).clone(width=config.mup.base_width),
    ),
}


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


def loss(
    model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats and accuracy of images `(batch, 64)`; rows labelled PADDING do not count."""
    labels = batch["labels"]
    here = labels != PADDING
    logits = model.apply(variables, batch["images"], train, rngs={"dropout": rng} if train else None)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    count = here.sum().astype(jnp.float32)
    value = jnp.where(here, each, 0).sum() / count
    accuracy = (here & (logits.argmax(-1) == labels)).sum() / count
    return value, {"loss": value, "accuracy": accuracy, "count": count}


def load(config: Any) -> Source:
    """Read the images."""
    data = digits.load()
    majority = float(np.bincount(data.test_labels).max() / len(data.test_labels))
    return Source(
        batch=lambda step, rows=None: digits.digits_batch(config.seed, step, config.batch, rows),
        heldout=lambda: _heldout(config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description,
        reference={"majority_class": majority},
    )


def _heldout(batch: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    whole = digits.heldout_set()
    for number, start in enumerate(range(0, len(whole["labels"]), batch)):
        if number == limit:
            return
        part = {name: a[start : start + batch] for name, a in whole.items()}
        short = batch - len(part["labels"])
        yield {
            "images": np.pad(part["images"], ((0, short), (0, 0))),
            "labels": np.pad(part["labels"], (0, short), constant_values=PADDING),
        }
