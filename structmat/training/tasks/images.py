"""Image classification with patches: scikit-learn's digits, at their size or enlarged, or a user's own images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from structmat.data import images as data_images
from structmat.models import ViT
from structmat.models.vit import POOLS
from structmat.structures.errors import suggest
from structmat.training.errors import ConfigError
from structmat.training.model_choice import ModelChoice, at_least_one, divides
from structmat.training.task import Source, Task
from structmat.training.tasks.classification import heldout, loss, majority

SIZES = ("classes", "size", "patch", "channels", "layers", "width", "heads", "mlp_ratio")


def check_vit(config: Any) -> None:
    """Refuse sizes no ViT can have."""
    m = config.model
    at_least_one(m, SIZES)
    divides(m, "patch", "size")
    divides(m, "heads", "width")
    if m.pool not in POOLS:
        raise ConfigError("model.pool", m.pool, "no such pooling" + suggest(m.pool, POOLS))


def build_vit(config: Any) -> ViT:
    """The module."""
    m = config.model
    fields = (*SIZES, "pool", "dropout", "scan", "remat")
    return ViT(**{name: m[name] for name in fields}, dtype=jnp.dtype(m.dtype))


MODELS = {
    "vit": ModelChoice(
        fields=dict(
            classes=10,
            size=8,  # side of the images, in pixels
            patch=2,  # side of a patch
            channels=1,
            layers=2,
            width=64,
            heads=4,
            mlp_ratio=4,
            pool="token",  # token | mean: what the head reads
            dropout=0.0,
            scan=True,  # stack and scan equal adjacent layers: compiles faster
            remat="none",  # none | full | dots: recompute activations in the backward pass
            dtype="float32",  # compute dtype; parameters stay float32
        ),
        check=check_vit,
        build=build_vit,
        base=lambda config: build_vit(config).clone(width=config.mup.base_width, heads=1),
    ),
}


def defaults(model: str = "vit") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            root="",  # '' is scikit-learn's digits; else a folder of train_images.npy, train_labels.npy and test_...
        ),
    )


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    MODELS[config.model.name].check(config)


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    m, choice = config.model, MODELS[config.model.name]
    images = jax.ShapeDtypeStruct((config.batch, m.size, m.size, m.channels), jnp.float32)
    cut = (m.size // m.patch) ** 2
    tokens = cut + (m.pool == "token")
    rows = {"patches": cut * config.batch, "head": config.batch}
    return Task(
        name="images",
        model=choice.build(config),
        base=choice.base(config),
        example=(images,),
        batch={"images": images, "labels": jax.ShapeDtypeStruct((config.batch,), jnp.int32)},
        loss=loss,
        metric="accuracy",
        unit="image",
        units=config.batch,
        other_flops=m.layers * 4 * tokens**2 * m.width,
        load=lambda: load(config),
        rows=lambda path: rows.get(path, tokens * config.batch),
    )


def load(config: Any) -> Source:
    """Read the images.

    Raises:
      DataError: missing or malformed files, or images or labels the model does not fit.
    """
    m = config.model
    data = data_images.load(config.data.root)
    data_images.check_fit(data, m.size, m.channels, m.classes)
    test = lambda part: data_images.enlarged(data.test_images[part], m.size, m.channels)
    return Source(
        batch=lambda step, rows=None: data_images.image_batch(
            data, config.seed, step, config.batch, m.size, m.channels, rows
        ),
        heldout=lambda: heldout(test, data.test_labels, config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description,
        reference=majority(data.test_labels),
    )
