"""Image classification: scikit-learn's digits, at their size or enlarged, or a user's own images."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from structmat.data import images as data_images
from structmat.data.moved import HELDOUT, draws, moved
from structmat.training.errors import ConfigError
from structmat.training.task import Source, Task
from structmat.training.tasks.classification import MOVES, check_moves, heldout, loss, majority, moves_said
from structmat.training.tasks.image_models import MODELS


def defaults(model: str = "vit") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            root="",  # '' is scikit-learn's digits; else a folder of train_images.npy, train_labels.npy and test_...
            **MOVES,
            crop=0,  # pixels: training images are crops of their own size, with so many pixels of zeros around them
            flip=False,  # and half of them, at random, are reflected left to right
            smoothing=0.0,  # share of every training label that is spread over all classes
        ),
    )


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    MODELS[config.model.name].check(config)
    check_moves(config.data)
    if not 0 <= config.data.crop < config.model.size:
        raise ConfigError(
            "data.crop", config.data.crop, f"must be in 0 .. {config.model.size - 1} pixels", "4 is common"
        )
    if not 0 <= config.data.smoothing < 1:
        raise ConfigError("data.smoothing", config.data.smoothing, "must be in [0, 1)", "0.1 is common")


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    m, choice = config.model, MODELS[config.model.name]
    images = jax.ShapeDtypeStruct((config.batch, m.size, m.size, m.channels), jnp.float32)
    rows = choice.rows(config)
    return Task(
        name="images",
        model=choice.build(config),
        base=choice.base(config),
        example=(images,),
        batch={"images": images, "labels": jax.ShapeDtypeStruct((config.batch,), jnp.int32)},
        loss=functools.partial(loss, smoothing=config.data.smoothing),
        metric="accuracy",
        unit="image",
        units=config.batch,
        other_flops=choice.other_flops(config),
        load=lambda: load(config),
        rows=lambda path: config.batch * rows(path),
        logits=True,
    )


def load(config: Any) -> Source:
    """Read the images.

    Raises:
      DataError: missing or malformed files, or images or labels the model does not fit.
    """
    m, moves = config.model, {name: config.data[name] for name in MOVES}
    crop, flip = config.data.crop, config.data.flip
    data = data_images.load(config.data.root)
    data_images.check_fit(data, m.size, m.channels, m.classes)
    where = draws(HELDOUT, 0, len(data.test_labels))
    test = lambda part: data_images.enlarged(moved(data.test_images[part], where[part], **moves), m.size, m.channels)
    return Source(
        batch=lambda step, rows=None: data_images.image_batch(
            data, config.seed, step, config.batch, m.size, m.channels, rows, **moves, crop=crop, flip=flip
        ),
        heldout=lambda: heldout(test, data.test_labels, config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description + moves_said(config.data),
        reference=majority(data.test_labels),
    )
