"""A model applied in training or evaluation, with what its structures add to the loss."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.nn import AUXILIARY
from structmat.training.task import Variables


def applied(
    model: nn.Module, variables: Variables, inputs: jax.Array, rng: jax.Array | None, train: bool
) -> tuple[Any, jax.Array | None]:
    """(output, the sum of the auxiliary terms of its structures), the latter None in evaluation and where there are none.

    Args:
      rng: of dropout; None where `train` is False.
    """
    if not train:
        return model.apply(variables, inputs, False), None
    out, sown = model.apply(variables, inputs, True, rngs={"dropout": rng}, mutable=[AUXILIARY])
    terms = jax.tree.leaves(sown)
    return out, sum(jnp.sum(term) for term in terms) if terms else None


def with_auxiliary(
    value: jax.Array, metrics: dict[str, jax.Array], extra: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss with the auxiliary terms, and metrics that have them apart."""
    return (value, metrics) if extra is None else (value + extra, metrics | {"auxiliary": extra})
