"""The head of every model: features to logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.nn import StructuredDense, StructuredEmbed
from structmat.nn.sites import pick


def logits(
    x: jax.Array,
    features: int,
    structures: Structures,
    dtype: Any,
    out_axes: str,
    in_axes: str = "embed",
    use_bias: bool = True,
) -> jax.Array:
    """x `(..., width)` -> f32 `(..., features)` by the site `head` of the calling module, zero at initialisation.

    Args:
      dtype: of the product. out_axes, in_axes: logical axes of the weight.
    """
    layer = StructuredDense(
        features,
        structure=pick(structures, "head"),
        use_bias=use_bias,
        dtype=dtype,
        in_axes=in_axes,
        out_axes=out_axes,
        kind="head",
        gain=0.0,
        name="head",
    )
    return layer(x).astype(jnp.float32)


def tied_logits(embed: StructuredEmbed, x: jax.Array, scale: float | None) -> jax.Array:
    """x `(..., width)` -> f32 `(..., vocab)` by the transposed embedding, times `scale`; None is 1 / width, as muP asks."""
    return embed.attend(x).astype(jnp.float32) * (1 / x.shape[-1] if scale is None else scale)
