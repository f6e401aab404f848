"""Functions between stored and effective weights: straight-through estimators, RMS cap, fake quantisation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def ste(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """The value of `hard` with the gradient of `soft` (straight through)."""
    return lax.stop_gradient(hard) + (soft - lax.stop_gradient(soft))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sr_ste(w: jax.Array, mask: jax.Array, decay: float) -> jax.Array:
    """mask * w, whose gradient is that at the masked weights, dense, plus decay (1 - mask) w.

    Zhou et al. 2021, arXiv 2102.04010; decay 0 is the plain straight-through estimator.

    Args:
      w: any shape. mask: boolean, same shape; gets no gradient. decay: the paper uses 2e-4.
    """
    return jnp.where(mask, w, 0)


def _sr_ste_forward(w, mask, decay):
    return sr_ste(w, mask, decay), (w, mask)


def _sr_ste_backward(decay, saved, g):
    w, mask = saved
    return g + decay * jnp.where(mask, 0, w), None


sr_ste.defvjp(_sr_ste_forward, _sr_ste_backward)


def rms_cap(w: jax.Array, gamma: jax.Array, sigma: float) -> jax.Array:
    """gamma * w / max(1, RMS(w) / sigma): Qiu et al. 2024's weight normalisation, arXiv 2406.06248.

    Zero weights have a finite gradient.
    """
    return gamma * w / rms_excess(w, sigma).astype(w.dtype)


def rms_excess(w: jax.Array, sigma: float) -> jax.Array:
    """max(1, RMS(w) / sigma), at least f32."""
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    square = jnp.real(wide * jnp.conj(wide))
    return jnp.sqrt(jnp.maximum(1, jnp.mean(square) / sigma**2))


def fake_quantize(w: jax.Array, bits: int, group: int) -> jax.Array:
    """w rounded to signed `bits`-bit integers times one scale per group, with a straight-through gradient.

    Groups are runs of `group` consecutive entries in row-major order, the last possibly shorter; the scale is the
    group's largest modulus / (2^(bits-1) - 1), so nothing is clipped.
    """
    levels = 2 ** (bits - 1) - 1
    flat = w.reshape(-1)
    padded = jnp.pad(flat, (0, -flat.size % group)).reshape(-1, group)
    scale = jnp.max(jnp.abs(padded), axis=1, keepdims=True) / levels
    rounded = jnp.round(padded / jnp.where(scale > 0, scale, 1)) * scale
    return ste(rounded.reshape(-1)[: flat.size].reshape(w.shape), w)
