"""What tasks of labelled images share: the loss, and held-out batches filled up to one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from structmat.training.applied import applied, with_auxiliary
from structmat.training.task import Batch, Variables

PADDING = -1
"""Label of rows that only fill up a batch."""


def loss(
    model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats and accuracy of images `(batch, ...)`; rows labelled PADDING do not count."""
    labels = batch["labels"]
    here = labels != PADDING
    logits, extra = applied(model, variables, batch["images"], rng, train)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
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
