"""What tasks of labelled images share: the loss, random moves, and held-out batches filled up to one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from structmat.training.applied import applied, with_auxiliary
from structmat.training.errors import ConfigError
from structmat.training.task import Batch, Variables

PADDING = -1
"""Label of rows that only fill up a batch."""
MOVES = dict(
    shift=0,  # pixels: images, held-out ones too, are shifted by up to these at random along both axes
    rotation=0.0,  # degrees: and turned by up to these, either way
)
"""Fields of `config.data`."""


def check_moves(data: Any) -> None:
    """Refuse moves that are none."""
    if data.shift < 0:
        raise ConfigError("data.shift", data.shift, "must be at least 0", "0 leaves images where they are")
    if not 0 <= data.rotation <= 180:
        raise ConfigError("data.rotation", data.rotation, "must be in [0, 180] degrees", "0 leaves images as they are")


def moves_said(data: Any) -> str:
    """For people; '' where nothing moves."""
    said = [f"shifted by up to {data.shift} pixels"] * bool(data.shift)
    said += [f"turned by up to {data.rotation:g} degrees"] * bool(data.rotation)
    return "".join(f", {part}" for part in said)


def loss(
    model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool, smoothing: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats and accuracy of images `(batch, ...)`; rows labelled PADDING do not count.

    smoothing: share of every training label that is spread over all classes evenly.
    """
    labels = batch["labels"]
    here = labels != PADDING
    logits, extra = applied(model, variables, batch["images"], rng, train)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    if train and smoothing:
        each = (1 - smoothing) * each - smoothing * jax.nn.log_softmax(logits).mean(-1)
    count = here.sum().astype(jnp.float32)
    value = jnp.where(here, each, 0).sum() / count
    accuracy = (here & (logits.argmax(-1) == labels)).sum() / count
    return with_auxiliary(value, {"loss": value, "accuracy": accuracy, "count": count}, extra)


def heldout(
    images: Callable[[slice], np.ndarray], labels: np.ndarray, batch: int, limit: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, at most `limit`, the last filled up with rows labelled PADDING.

    Args:
      images: a slice of the rows -> their images, float32.
    """
    for number, start in enumerate(range(0, len(labels), batch)):
        if number == limit:
            return
        part = slice(start, start + batch)
        shown, named = images(part), labels[part].astype(np.int32)
        short = batch - len(named)
        yield {
            "images": np.pad(shown, ((0, short), *((0, 0),) * (shown.ndim - 1))),
            "labels": np.pad(named, (0, short), constant_values=PADDING),
        }


def majority(labels: np.ndarray) -> dict[str, float]:
    """What always naming the commonest held-out label reaches."""
    return {"majority_class": float(np.bincount(labels).max() / len(labels))}
