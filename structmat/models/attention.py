"""What attention layers share: structured projections into and out of heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from structmat.nn import StructuredDenseGeneral
from structmat.nn.sites import pick

Structures = tuple[tuple[str, Any], ...]


def into_heads(
    x: jax.Array,
    name: str,
    heads: int,
    size: int,
    structures: Structures,
    dtype: Any,
    gain: float = 1.0,
    use_bias: bool = True,
) -> jax.Array:
    """x `(batch, length, width)` -> `(batch, length, heads, size)` by the site `name` of the calling module."""
    layer = StructuredDenseGeneral(
        (heads, size),
        structure=pick(structures, name),
        use_bias=use_bias,
        dtype=dtype,
        in_axes="embed",
        out_axes=("heads", "kv"),
        gain=gain,
        name=name,
    )
    return layer(x)


def out_of_heads(
    y: jax.Array, name: str, width: int, structures: Structures, dtype: Any, use_bias: bool = True
) -> jax.Array:
    """y `(batch, length, heads, size)` -> `(batch, length, width)` by the site `name`, zero at initialisation."""
    layer = StructuredDenseGeneral(
        width,
        axis=(-2, -1),
        structure=pick(structures, name),
        use_bias=use_bias,
        dtype=dtype,
        in_axes=("heads", "kv"),
        out_axes="embed",
        gain=0.0,
        name=name,
    )
    return layer(y)


def causal(length: int) -> jax.Array:
    """bool `(1, 1, length, length)`: a token sees itself and what came before."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
