"""A small U-Net (Ronneberger et al. 2015) of structured 3 x 3 convolutions, image to image."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.coordinates import with_coordinates
from structmat.models.resnet import GROUPS, conv
from structmat.nn.sites import scope
from structmat.structures.convolution import View

PADDINGS = ("CIRCULAR", "SAME")


class DoubleConv(nn.Module):
    """x `(batch, h, w, channels)` -> `(batch, h, w, width)`: twice a 3 x 3 convolution, group normalisation and GELU. Sites
    conv1, conv2."""

    width: int
    padding: str
    view: View
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, axes in ((1, ("embed", "mlp")), (2, ("mlp", "embed"))):
            x = conv(f"conv{i}", self.width, 3, self.structures, self.view, self.dtype, axes, self.padding)(x)
            x = nn.gelu(nn.GroupNorm(math.gcd(self.width, GROUPS), dtype=self.dtype, name=f"norm{i}")(x))
        return x


class UNet(nn.Module):
    """x `(batch, h, w, channels)` -> `(batch, h, w, features)` f32; both sides must divide by 2^depth.

    Down: DoubleConv and 2 x 2 means, twice the width at each step; up: every point repeated 2 x 2, a 3 x 3 convolution to
    half the width, and a DoubleConv of it beside what the way down had at that size. Sites of kind `conv`: down_i/conv{1,2},
    middle/conv{1,2}, up_i, merge_i/conv{1,2} (i counts from the top), and head (1 x 1).

    Attributes:
      features: output channels.
      width: channels at the top. depth: halvings of the side.
      padding: `CIRCULAR` for periodic fields, `SAME` pads with zeros.
      residual: add the input, which must then have `features` channels.
      grid: whether the coordinates of each point, in [0, 1), are appended to its channels. Without them the model commutes with
        shifts of the grid, and cannot know a force that differs from place to place.
      view: which matrix of a kernel is structured, see structmat.structures.convolution.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: compute dtype; parameters stay f32.
    """

    features: int = 1
    width: int = 32
    depth: int = 3
    padding: str = "CIRCULAR"
    residual: bool = False
    grid: bool = False
    view: View = "channel"
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {self.padding!r}")
        if x.ndim != 4 or any(n % 2**self.depth for n in x.shape[1:3]):
            raise ValueError(
                f"depth={self.depth} needs (batch, h, w, channels), h and w divisible by {2**self.depth}; got {x.shape}"
            )
        if self.residual and x.shape[-1] != self.features:
            raise ValueError(f"residual=True adds an input of {x.shape[-1]} channels to features={self.features}")
        own = dict(padding=self.padding, view=self.view, dtype=self.dtype)
        double = lambda y, name, width: DoubleConv(width, structures=scope(self.structures, name), name=name, **own)(y)
        y, kept = (with_coordinates(x) if self.grid else x).astype(self.dtype), []
        for i in range(self.depth):
            y = double(y, f"down_{i}", self.width * 2**i)
            kept.append(y)
            y = nn.avg_pool(y, (2, 2), (2, 2))
        y = double(y, "middle", self.width * 2**self.depth)
        for i in reversed(range(self.depth)):
            y = y.repeat(2, axis=1).repeat(2, axis=2)
            y = conv(f"up_{i}", self.width * 2**i, 3, self.structures, axes=("embed", "embed"), **own)(y)
            y = double(jnp.concatenate([kept[i], y], -1), f"merge_{i}", self.width * 2**i)
        y = conv("head", self.features, 1, self.structures, axes=("embed", "features"), **own)(y).astype(jnp.float32)
        return x.astype(jnp.float32) + y if self.residual else y
