"""A decoder-only transformer in LLaMA's layout: RMSNorm, rotary positions, gated MLP, grouped queries, no biases."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures, causal, into_heads, out_of_heads
from structmat.models.cache import advance, append
from structmat.models.head import logits, tied_logits
from structmat.models.rope import rotate
from structmat.models.stack import apply_layers
from structmat.nn import StructuredDense, StructuredEmbed
from structmat.nn.sites import pick, scope


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions: x `(batch, length, width)` -> the same; sites q, k, v, o.

    Each of `kv_heads` keys and values is shared by heads / kv_heads adjacent queries.
    """

    heads: int
    kv_heads: int
    context: int
    theta: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, decode: bool) -> jax.Array:
        length, width = x.shape[1:]
        into = lambda name, heads, gain: into_heads(
            x, name, heads, width // self.heads, self.structures, self.dtype, gain, use_bias=False
        )
        q, k, v = into("q", self.heads, 0.0), into("k", self.kv_heads, 1.0), into("v", self.kv_heads, 1.0)
        start = advance(self, length) if decode else 0
        q, k, mask = rotate(q, start, self.theta), rotate(k, start, self.theta), causal(length)
        if decode:
            k, v, mask = append(self, k, v, start, self.context)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return out_of_heads(y, "o", width, self.structures, self.dtype, use_bias=False)


class GatedMLP(nn.Module):
    """x `(..., width)` -> down(silu(gate(x)) * up(x)) `(..., width)`, with `hidden` units between (SwiGLU)."""

    hidden: int
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = lambda name, features, within, out, gain=1.0: StructuredDense(
            features,
            structure=pick(self.structures, name),
            use_bias=False,
            dtype=self.dtype,
            in_axes=within,
            out_axes=out,
            gain=gain,
            name=name,
        )
        gate, up = (layer(name, self.hidden, "embed", "mlp")(x) for name in ("gate", "up"))
        return layer("down", x.shape[-1], "mlp", "embed", gain=0.0)(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention and gated MLP with residuals; both branches start at zero. Sites attn/{q,k,v,o}, mlp/{gate,up,down}."""

    heads: int
    kv_heads: int
    hidden: int
    context: int
    theta: float
    eps: float
    dropout: float
    dtype: Any
    structures: Structures

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, decode: bool) -> tuple[jax.Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        norm = lambda name: nn.RMSNorm(self.eps, dtype=self.dtype, name=name)
        attention = GroupedAttention(
            self.heads,
            self.kv_heads,
            self.context,
            self.theta,
            self.dtype,
            scope(self.structures, "attn"),
            name="attn",
        )
        x = x + drop(attention(norm("attn_norm")(x), decode))
        mlp = GatedMLP(self.hidden, self.dtype, scope(self.structures, "mlp"), name="mlp")
        return x + drop(mlp(norm("mlp_norm")(x))), None


BLOCK_FIELDS = ("heads", "kv_heads", "hidden", "context", "theta", "eps", "dropout", "dtype")


class Llama(nn.Module):
    """tokens `(batch, length)` int32 -> logits `(batch, length, vocab)` f32.

    Attributes:
      vocab, context, layers, width, heads: sizes; heads must divide width into heads of even size.
      kv_heads: key and value heads, a divisor of heads.
      hidden: units of the gated MLP.
      theta: base of the rotary angles. eps: of the norms.
      dropout: rate on residual branches.
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
    kv_heads: int = 4
    hidden: int = 344
    theta: float = 10000.0
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
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens do not fit context={self.context}")
        embed = StructuredEmbed(
            self.vocab, self.width, structure=pick(self.structures, "embed"), dtype=self.dtype, name="embed"
        )
        x = nn.with_logical_constraint(embed(tokens), ("batch", "length", "embed_act"))
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
        x = nn.RMSNorm(self.eps, dtype=self.dtype, name="norm")(x)
        if self.tie:
            return tied_logits(embed, x, self.tied_scale)
        return logits(x, self.vocab, self.structures, self.dtype, "vocab", use_bias=False)
