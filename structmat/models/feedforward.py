"""The MLP inside a block of a transformer or a mixer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from structmat.models.attention import Structures
from structmat.nn import StructuredDense
from structmat.nn.sites import pick


class FeedForward(nn.Module):
    """Two linear maps around a GELU: width -> hidden -> width; sites up (column-parallel), down (row-parallel).

    Attributes:
      axis: logical axis of the width.
    """

    hidden: int
    dtype: Any
    structures: Structures
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        up = StructuredDense(
            self.hidden,
            structure=pick(self.structures, "up"),
            dtype=self.dtype,
            in_axes=self.axis,
            out_axes="mlp",
            name="up",
        )
        down = StructuredDense(
            width,
            structure=pick(self.structures, "down"),
            dtype=self.dtype,
            in_axes="mlp",
            out_axes=self.axis,
            gain=0.0,
            name="down",
        )
        return down(nn.gelu(up(x)))
