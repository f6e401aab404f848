"""Small residual networks (He et al. 2016, pre-activation) of structured 3 x 3 convolutions: of images, and of fields."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.coordinates import with_coordinates
from structmat.models.fno import pointwise
from structmat.models.head import logits
from structmat.nn import StructuredConv
from structmat.nn.sites import pick, scope
from structmat.structures.convolution import View

GROUPS = 4
"""Of channels that are normalised together, or their largest common divisor with the width."""


def conv(
    name: str,
    features: int,
    size: int,
    structures: Structures,
    view: View,
    dtype: Any,
    axes: tuple[str, str],
    padding: str = "SAME",
) -> Any:
    """The convolution of a site, size x size."""
    return StructuredConv(
        features,
        (size, size),
        structure=pick(structures, name),
        padding=padding,
        view=view,
        dtype=dtype,
        in_axes=axes[0],
        out_axes=axes[1],
        name=name,
    )


def active(x: jax.Array, name: str, dtype: Any) -> jax.Array:
    """Group normalisation, then ReLU."""
    return nn.relu(nn.GroupNorm(math.gcd(x.shape[-1], GROUPS), dtype=dtype, name=name)(x))


class Block(nn.Module):
    """x `(batch, side, side, channels)` -> `(..., width)`: sites conv1, conv2, and shortcut (1 x 1) where the width changes."""

    width: int
    view: View
    dropout: float
    dtype: Any
    structures: Structures
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        own = dict(structures=self.structures, view=self.view, dtype=self.dtype, padding=self.padding)
        y = active(x, "norm1", self.dtype)
        if x.shape[-1] != self.width:
            x = conv("shortcut", self.width, 1, axes=("embed", "embed"), **own)(y)
        y = active(conv("conv1", self.width, 3, axes=("embed", "mlp"), **own)(y), "norm2", self.dtype)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + conv("conv2", self.width, 3, axes=("mlp", "embed"), **own)(y)


class ResNet(nn.Module):
    """images `(batch, size, size, channels)` -> logits `(batch, classes)` f32.

    Sites of kind `conv`: stem, layers_i/{conv1, conv2, shortcut}; and head. A stage after the first halves the side by
    2 x 2 means, where others have a stride: so every factor of a convolution works at the resolution of its output, and
    costs what its matrix says under every view.

    Attributes:
      classes: of images. width: channels of the first stage; each later one has twice those before it.
      stages, blocks: how many, and blocks in each; size must divide by 2 ** (stages - 1).
      view: which matrix of a kernel is structured, see structmat.structures.convolution.
      dropout: rate within every block.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters stay f32.
    """

    classes: int = 10
    width: int = 16
    stages: int = 2
    blocks: int = 1
    view: View = "channel"
    dropout: float = 0.0
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if any(side % 2 ** (self.stages - 1) for side in images.shape[1:3]):
            raise ValueError(
                f"stages={self.stages} halve the side {self.stages - 1} times, and {images.shape[1:3]} is not divisible so"
            )
        own = dict(view=self.view, dtype=self.dtype)
        x = conv("stem", self.width, 3, self.structures, axes=("features", "embed"), **own)(images)
        for i in range(self.stages * self.blocks):
            stage, first = i // self.blocks, i % self.blocks == 0
            if stage and first:
                x = nn.avg_pool(x, (2, 2), (2, 2))
            name = f"layers_{i}"
            block = Block(
                self.width * 2**stage, dropout=self.dropout, structures=scope(self.structures, name), name=name, **own
            )
            x = block(x, train)
        x = active(x, "norm", self.dtype).mean((1, 2))
        return logits(x, self.classes, self.structures, self.dtype, "classes")


class FieldResNet(nn.Module):
    """x `(batch, h, w, channels)`, periodic -> `(batch, h, w, features)` f32, all blocks of one width on the whole grid.

    Sites of kind `conv`: stem, layers_i/{conv1, conv2}; and head, at every point.

    Attributes:
      features: output channels. width: hidden channels.
      blocks: of two 3 x 3 convolutions.
      grid: whether the coordinates of each point, in [0, 1), are appended to its channels. Without them the model commutes with
        shifts of the grid, and cannot know a force that differs from place to place.
      view: which matrix of a kernel is structured, see structmat.structures.convolution.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters stay f32.
    """

    features: int = 1
    width: int = 32
    blocks: int = 8
    grid: bool = False
    view: View = "channel"
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        own = dict(view=self.view, dtype=self.dtype, padding="CIRCULAR")
        x = with_coordinates(x) if self.grid else x
        y = conv("stem", self.width, 3, self.structures, axes=("features", "embed"), **own)(x)
        for i in range(self.blocks):
            name = f"layers_{i}"
            y = Block(self.width, dropout=0.0, structures=scope(self.structures, name), name=name, **own)(y, train)
        y = active(y, "norm", self.dtype)
        y = pointwise(y, "head", self.features, self.structures, self.dtype, ("embed", "features"), kind="head")
        return y.astype(jnp.float32)
