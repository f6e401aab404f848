"""Adam whose moments are kept in 8 bits: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022.

Each block of a row is scaled by its largest entry. As there, codes are denser near zero, but in a geometric series instead
of a table: averages of gradients keep 6 decades with a sign to 6%, averages of squares 12 to 6%, and what is positive never
rounds to zero. Codes have the shape of their parameter, so they are laid out over a mesh as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256
"""Entries of a row that share a scale; a row that is no multiple of it is one block."""
SIGNED, POSITIVE = (127, 6.0), (255, 12.0)
"""Levels of a code beside 0, and the decades they span."""
SMALLEST = 4096
"""Entries below which a parameter's moments stay as they are."""


class Adam8BitState(NamedTuple):
    """Attributes: count: int32 () updates. mu, nu: codes, int8 and uint8 of the parameter's shape; of parameters that are
    complex, small or vectors the moments themselves. mu_scale, nu_scale: f32 (..., blocks); (0,) of those."""

    count: jax.Array
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with 8-bit moments: 2 bytes a parameter and 8 a block instead of 8 a parameter."""

    def init(params: Any) -> Adam8BitState:
        packed = jax.tree.map(lambda p: pack(jnp.zeros_like(p), jnp.zeros_like(p)), params)
        return Adam8BitState(jnp.zeros((), jnp.int32), *_fields(packed, params))

    def update(grads: Any, state: Adam8BitState, params: Any = None) -> tuple[Any, Adam8BitState]:
        count = optax.safe_increment(state.count)
        rise1, rise2 = (1 - jnp.float32(b) ** count for b in (b1, b2))

        def one(g: jax.Array, *kept: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            mu, nu = unpack(g, *kept)
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * jnp.square(jnp.abs(g)).astype(nu.dtype)
            step = (mu / rise1) / (jnp.sqrt(jnp.real(nu) / rise2) + eps)
            return step.astype(g.dtype), pack(mu, nu)

        found = jax.tree.map(one, grads, *state[1:])
        steps = jax.tree.map(lambda g, pair: pair[0], grads, found)
        packed = jax.tree.map(lambda g, pair: pair[1], grads, found)
        return steps, Adam8BitState(count, *_fields(packed, grads))

    return optax.GradientTransformation(init, update)


def pack(mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Moments as kept: (mu, nu, mu_scale, nu_scale) of `Adam8BitState`."""
    if not packs(mu):
        none = jnp.zeros((0,), jnp.float32)
        return mu, nu, none, none
    signed, positive = _blocks(mu.astype(jnp.float32)), _blocks(nu.astype(jnp.float32))
    high, top = jnp.max(jnp.abs(signed), -1), jnp.max(positive, -1)
    code = jnp.sign(signed) * _level(jnp.abs(signed), high, SIGNED, 0)
    level = jnp.where(positive > 0, _level(positive, top, POSITIVE, 1), 0)
    return code.astype(jnp.int8).reshape(mu.shape), level.astype(jnp.uint8).reshape(mu.shape), high, top


def unpack(
    like: jax.Array, mu: jax.Array, nu: jax.Array, mu_scale: jax.Array, nu_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The moments of a parameter like `like`, f32 where they were packed."""
    if not packs(like):
        return mu, nu
    code, level = _blocks(mu.astype(jnp.float32)), _blocks(nu.astype(jnp.float32))
    signed = jnp.sign(code) * _value(jnp.abs(code), mu_scale, SIGNED)
    return signed.reshape(like.shape), _value(level, nu_scale, POSITIVE).reshape(like.shape)


def _level(x: jax.Array, scale: jax.Array, series: tuple[int, float], lowest: int) -> jax.Array:
    """The level of x in 0 .. scale, of the series (levels, decades)."""
    levels, decades = series
    part = x / jnp.where(scale > 0, scale, 1)[..., None]
    log = jnp.log10(jnp.where(part > 0, part, 1)) * (levels - 1) / decades
    return jnp.where(part > 0, jnp.clip(jnp.round(levels + log), lowest, levels), 0)


def _value(level: jax.Array, scale: jax.Array, series: tuple[int, float]) -> jax.Array:
    """The middle of a level; 0 of level 0."""
    levels, decades = series
    value = 10 ** (decades * (level - levels) / (levels - 1))
    return jnp.where(level > 0, value * scale[..., None], 0)


def packs(leaf: Any) -> bool:
    """Whether the moments of a parameter are kept in 8 bits: matrices and stacks of them, of at least SMALLEST entries."""
    return leaf.ndim >= 2 and leaf.size >= SMALLEST and jnp.issubdtype(leaf.dtype, jnp.floating)


def _blocks(x: jax.Array) -> jax.Array:
    """(..., n) as (..., blocks, entries)."""
    size = BLOCK if x.shape[-1] % BLOCK == 0 else x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, size)


def _fields(packed: Any, like: Any) -> list[Any]:
    """Trees of the four parts, out of a tree of them."""
    return [jax.tree.map(lambda _, parts, i=i: parts[i], like, packed) for i in range(4)]
