"""Image classification on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.data import digits
from structmat.data.moved import HELDOUT, draws, moved
from structmat.training.task import Source, Task
from structmat.training.tasks.classification import MOVES, check_moves, heldout, loss, majority, moves_said
from structmat.training.tasks.mlp_model import mlp_choice

SIDE, CLASSES = 8, 10
PIXELS = SIDE**2


MODELS = {"mlp": mlp_choice(CLASSES, layers=2)}


def defaults(model: str = "mlp") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(model=dict(name=model, **MODELS[model].fields), data=dict(MOVES))


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    check_moves(config.data)
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
        logits=True,
    )


def load(config: Any) -> Source:
    """Read the images."""
    data = digits.load()

    def shown(images: np.ndarray, draw: np.ndarray) -> np.ndarray:
        square = images.reshape(-1, SIDE, SIDE, 1)
        return moved(square, draw, config.data.shift, config.data.rotation).reshape(images.shape)

    def batch(step: int, rows: range | None = None) -> dict[str, np.ndarray]:
        found = digits.digits_batch(config.seed, step, config.batch, rows)
        return found | {"images": shown(found["images"], draws(config.seed, step, config.batch, rows))}

    whole = digits.heldout_set()
    test = shown(whole["images"], draws(HELDOUT, 0, len(whole["labels"])))
    return Source(
        batch=batch,
        heldout=lambda: heldout(lambda part: test[part], whole["labels"], config.batch, config.eval.batches or None),
        sha256=data.sha256,
        description=data.description + moves_said(config.data),
        reference=majority(data.test_labels),
    )
