"""A decoder-only transformer (GPT-2's layout: pre-LayerNorm, learned positions, GELU) with structured weights."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures, causal, into_heads, out_of_heads
from structmat.models.cache import advance, append
from structmat.models.feedforward import FeedForward
from structmat.models.head import logits, tied_logits
from structmat.models.stack import apply_layers
from structmat.nn import StructuredEmbed
from structmat.nn.sites import pick, scope


class Attention(nn.Module):
    """Causal multi-head self-attention: x `(batch, length, width)` -> the same; sites q, k, v, o."""

    heads: int
    context: int
    dropout: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, decode: bool) -> jax.Array:
        length, width = x.shape[1:]
        into = lambda name, gain: into_heads(
            x, name, self.heads, width // self.heads, self.structures, self.dtype, gain
        )
        q, k, v = into("q", 0.0), into("k", 1.0), into("v", 1.0)  # attention starts uniform, as muP asks
        mask = causal(length)
        if decode:
            k, v, mask = append(self, k, v, advance(self, length), self.context)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
        weights = nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)).astype(v.dtype)
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return out_of_heads(y, "o", width, self.structures, self.dtype)


class Block(nn.Module):
    """Attention and MLP with residuals; both branches start at zero. Sites attn/{q,k,v,o}, mlp/{up,down}."""

    heads: int
    context: int
    mlp_ratio: int
    eps: float
    dropout: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, decode: bool) -> tuple[jax.Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        own = scope(self.structures, "attn")
        y = nn.LayerNorm(self.eps, dtype=self.dtype, name="attn_norm")(x)
        y = Attention(self.heads, self.context, self.dropout, self.dtype, own, name="attn")(y, train, decode)
        x = x + drop(y)
        y = nn.LayerNorm(self.eps, dtype=self.dtype, name="mlp_norm")(x)
        mlp = FeedForward(self.mlp_ratio * x.shape[-1], self.dtype, scope(self.structures, "mlp"), name="mlp")
        return x + drop(mlp(y)), None


BLOCK_FIELDS = ("heads", "context", "mlp_ratio", "eps", "dropout", "dtype")


class GPT(nn.Module):
    """tokens `(batch, length)` int32 -> logits `(batch, length, vocab)` f32.

    Attributes:
      vocab, context, layers, width, heads, mlp_ratio: sizes; heads must divide width.
      eps: of the norms.
      dropout: rate on attention weights and residual branches.
      tie: the head is the transposed embedding instead of a weight of its own.
      tied_scale: factor on tied logits; None is 1 / width, as muP asks.
      structures: layer path -> structure, from `structmat.nn.assign`.
      scan: stack and scan adjacent equal layers. remat: `none`, `full` or `dots`.
      dtype: compute dtype; parameters stay f32.
    """

    vocab: int = 256
    context: int = 64
    layers: int = 2
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    eps: float = 1e-6
    dropout: float = 0.0
    tie: bool = False
    tied_scale: float | None = None
    structures: Structures = ()
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False, decode: bool = False) -> jax.Array:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}")
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit context={self.context}")
        embed = StructuredEmbed(
            self.vocab, self.width, structure=pick(self.structures, "embed"), dtype=self.dtype, name="embed"
        )
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), (None, "embed"))
        positions = self.param("positions", init, (self.context, self.width), jnp.float32)
        start = jnp.zeros((), jnp.int32)
        if decode:
            start = advance(self, tokens.shape[1], "position")
        here = jax.lax.dynamic_slice_in_dim(positions, start, tokens.shape[1])
        x = embed(tokens) + here.astype(self.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = apply_layers(
            Block,
            {f: getattr(self, f) for f in BLOCK_FIELDS},
            x,
            train,
            decode,
            structures=self.structures,
            layers=self.layers,
            scan=self.scan,
            remat=self.remat,
        )
        x = nn.LayerNorm(self.eps, dtype=self.dtype, name="norm")(x)
        if self.tie:
            return tied_logits(embed, x, self.tied_scale)
        return logits(x, self.vocab, self.structures, self.dtype, "vocab", use_bias=False)
