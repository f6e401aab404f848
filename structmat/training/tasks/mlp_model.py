"""The choice `mlp` of tasks on points and small pictures."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from structmat.models import MLP
from structmat.training.model_choice import ModelChoice, at_least_one


def mlp_choice(outputs: int, layers: int) -> ModelChoice:
    """A perceptron with that many outputs, and that many hidden layers unless the config says otherwise."""

    def build(config: Any) -> MLP:
        m = config.model
        return MLP(outputs, m.width, m.layers, m.dropout, dtype=jnp.dtype(m.dtype))

    return ModelChoice(
        fields=dict(
            layers=layers,  # hidden ones
            width=128,
            dropout=0.0,
            dtype="float32",  # compute dtype; parameters stay float32
        ),
        check=lambda config: at_least_one(config.model, ("layers", "width")),
        build=build,
        base=lambda config: build(config).clone(width=config.mup.base_width),
    )
