"""The MLP inside a transformer block."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from structmat.models.attention import Structures
from structmat.nn import StructuredDense
from structmat.nn.sites import pick


class FeedForward(nn.Module):
    """Two linear maps around a GELU: width -> ratio * width -> width; sites up (column-parallel), down (row-parallel)."""

    ratio: int
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        up = StructuredDense(
            self.ratio * width,
            structure=pick(self.structures, "up"),
            dtype=self.dtype,
            in_axes="embed",
            out_axes="mlp",
            name="up",
        )
        down = StructuredDense(
            width,
            structure=pick(self.structures, "down"),
            dtype=self.dtype,
            in_axes="mlp",
            out_axes="embed",
            gain=0.0,
            name="down",
        )
        return down(nn.gelu(up(x)))
