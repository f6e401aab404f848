"""An MLP-Mixer (Tolstikhin et al. 2021): MLPs across patches and across channels in turn, with structured weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.feedforward import FeedForward
from structmat.models.head import logits
from structmat.models.stack import apply_layers
from structmat.models.vit import embed_patches
from structmat.nn.sites import scope


class MixerBlock(nn.Module):
    """x `(batch, tokens, width)` -> the same, with residuals; sites tokens/{up,down} work on columns of x, mlp/{up,down} on rows."""

    tokens_hidden: int
    mlp_ratio: int
    dropout: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        own = lambda name: dict(dtype=self.dtype, structures=scope(self.structures, name), name=name)
        tokens = FeedForward(self.tokens_hidden, axis="length", **own("tokens"))
        x = x + drop(tokens(norm("tokens_norm")(x).swapaxes(1, 2)).swapaxes(1, 2))
        mlp = FeedForward(self.mlp_ratio * x.shape[-1], **own("mlp"))
        return x + drop(mlp(norm("mlp_norm")(x))), None


class Mixer(nn.Module):
    """images `(batch, ...)` of size * size * channels values -> logits `(batch, classes)` f32.

    The patch embedding is the site `patches` of kind `conv`, as in `ViT`; the head reads the mean over patches.

    Attributes:
      classes, size, patch, channels: of the images; patch must divide size.
      layers, width, mlp_ratio: of the blocks. tokens_hidden: hidden units of the MLPs across patches.
      dropout: rate on residual branches.
      structures: layer path -> structure, from `structmat.nn.assign`.
      scan: stack and scan adjacent equal layers. remat: `none`, `full` or `dots`.
      dtype: compute dtype; parameters stay f32.
    """

    classes: int = 10
    size: int = 8
    patch: int = 2
    channels: int = 1
    layers: int = 2
    width: int = 64
    tokens_hidden: int = 32
    mlp_ratio: int = 4
    dropout: float = 0.0
    structures: Structures = ()
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = embed_patches(images, self.size, self.patch, self.channels, self.width, self.structures, self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        kwargs = dict(
            tokens_hidden=self.tokens_hidden, mlp_ratio=self.mlp_ratio, dropout=self.dropout, dtype=self.dtype
        )
        x = apply_layers(
            MixerBlock,
            kwargs,
            x,
            train,
            structures=self.structures,
            layers=self.layers,
            scan=self.scan,
            remat=self.remat,
        )
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(1)
        return logits(x, self.classes, self.structures, self.dtype, "classes")
