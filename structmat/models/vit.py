"""A vision transformer (Dosovitskiy et al. 2021): pre-LayerNorm encoder on image patches, with structured weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures, into_heads, out_of_heads
from structmat.models.feedforward import FeedForward
from structmat.models.head import logits
from structmat.models.stack import apply_layers
from structmat.nn import StructuredDense
from structmat.nn.sites import pick, scope

POOLS = ("token", "mean")


def patches(images: jax.Array, size: int, patch: int, channels: int) -> jax.Array:
    """Cut images into patches, both row by row.

    Args:
      images: `(batch, ...)`, size * size * channels values each: rows, columns, channels.

    Returns:
      `(batch, (size / patch)^2, patch * patch * channels)`.
    """
    side = size // patch
    x = images.reshape(-1, side, patch, side, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side * side, patch * patch * channels)


def embed_patches(
    images: jax.Array, size: int, patch: int, channels: int, width: int, structures: Structures, dtype: Any
) -> jax.Array:
    """As `patches`, times the site `patches` of the calling module: `(batch, (size / patch)^2, width)`.

    Raises:
      ValueError: patch does not divide size.
    """
    if size % patch:
        raise ValueError(f"patch={patch} must divide size={size}")
    layer = StructuredDense(
        width,
        structure=pick(structures, "patches"),
        dtype=dtype,
        in_axes="features",
        out_axes="embed",
        kind="conv",
        name="patches",
    )
    return layer(patches(images, size, patch, channels))


class Attention(nn.Module):
    """Every token attends to every other: x `(batch, tokens, width)` -> the same; sites q, k, v, o."""

    heads: int
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        into = lambda name, gain: into_heads(
            x, name, self.heads, width // self.heads, self.structures, self.dtype, gain
        )
        y = jax.nn.dot_product_attention(into("q", 0.0), into("k", 1.0), into("v", 1.0))
        return out_of_heads(y, "o", width, self.structures, self.dtype)


class Encoder(nn.Module):
    """Attention among all tokens and MLP with residuals; both start at zero. Sites attn/{q,k,v,o}, mlp/{up,down}."""

    heads: int
    mlp_ratio: int
    dropout: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)
        attention = Attention(self.heads, self.dtype, scope(self.structures, "attn"), name="attn")
        x = x + drop(attention(norm("attn_norm")(x)))
        mlp = FeedForward(self.mlp_ratio * x.shape[-1], self.dtype, scope(self.structures, "mlp"), name="mlp")
        return x + drop(mlp(norm("mlp_norm")(x))), None


class ViT(nn.Module):
    """images `(batch, ...)` of size * size * channels values -> logits `(batch, classes)` f32.

    The patch embedding is the site `patches` of kind `conv`, for it is a convolution of stride `patch`: rules reach it
    by its name.

    Attributes:
      classes, size, patch, channels: of the images; patch must divide size.
      layers, width, heads, mlp_ratio: of the encoder; heads must divide width.
      pool: `token` reads a class token, `mean` the mean over patches.
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
    heads: int = 4
    mlp_ratio: int = 4
    pool: str = "token"
    dropout: float = 0.0
    structures: Structures = ()
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        x = embed_patches(images, self.size, self.patch, self.channels, self.width, self.structures, self.dtype)
        if self.pool == "token":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
            token = self.param("token", zeros, (self.width,), jnp.float32).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.1), (None, "embed"))
        x = x + self.param("positions", normal, x.shape[1:], jnp.float32).astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        kwargs = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, dropout=self.dropout, dtype=self.dtype)
        x = apply_layers(
            Encoder,
            kwargs,
            x,
            train,
            structures=self.structures,
            layers=self.layers,
            scan=self.scan,
            remat=self.remat,
        )
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.pool == "token" else x.mean(1)
        return logits(x, self.classes, self.structures, self.dtype, "classes")
