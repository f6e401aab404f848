"""A multi-layer perceptron classifier with structured weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.head import logits
from structmat.nn import StructuredDense
from structmat.nn.sites import pick


class MLP(nn.Module):
    """x `(batch, features)` -> logits `(batch, classes)` f32; sites layers_0 .. layers_{depth-1} and head.

    Attributes:
      classes, width, depth: `depth` hidden layers of `width` ReLU units.
      dropout: rate after every hidden layer.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters stay f32.
    """

    classes: int = 10
    width: int = 128
    depth: int = 2
    dropout: float = 0.0
    structures: tuple[tuple[str, Any], ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        axis = "features"
        for i in range(self.depth):
            out = "mlp" if i % 2 == 0 else "embed"
            name = f"layers_{i}"
            layer = StructuredDense(
                self.width,
                structure=pick(self.structures, name),
                dtype=self.dtype,
                in_axes=axis,
                out_axes=out,
                name=name,
            )
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(layer(x)))
            axis = out
        return logits(x, self.classes, self.structures, self.dtype, "classes", in_axes=axis)
