"""How near an image is to its reference: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Window = Literal["gaussian", "uniform"]
SIGMA, GAUSSIAN, UNIFORM = 1.5, 11, 7
"""Deviation and side of the Gaussian window of Wang et al. 2004; side of the uniform one."""
K1, K2 = 0.01, 0.03


@jax.jit
def psnr(image: jax.Array, reference: jax.Array, peak: float | jax.Array | None = None) -> jax.Array:
    """10 log10(peak^2 / mean |image - reference|^2) in dB, `(...)` of `(..., h, w)`; infinite for equal images.

    peak: the largest value there can be; None is the largest magnitude of each reference.
    """
    peak = jnp.abs(reference).max((-2, -1)) if peak is None else peak
    return 10 * jnp.log10(jnp.square(peak) / jnp.square(jnp.abs(image - reference)).mean((-2, -1)))


@functools.partial(jax.jit, static_argnames=("window",))
def ssim(
    image: jax.Array, reference: jax.Array, peak: float | jax.Array | None = None, window: Window = "gaussian"
) -> jax.Array:
    """Mean structural similarity (Wang et al. 2004) in [-1, 1], `(...)` of real `(..., h, w)`; 1 for equal images.

    Args:
      peak: as in `psnr`.
      window: `gaussian`, 11 x 11 of deviation 1.5, as in the paper; `uniform`, 7 x 7 with unbiased variances, the default
        of scikit-image. Only windows that lie within the image count.

    Raises:
      ValueError: another window, a complex image, shapes that differ, or an image smaller than the window.
    """
    if window not in ("gaussian", "uniform"):
        raise ValueError(f"window is {window!r}; valid: 'gaussian', 'uniform'")
    if jnp.iscomplexobj(image) or jnp.iscomplexobj(reference):
        raise ValueError("ssim is defined for real images; pass magnitudes")
    size = GAUSSIAN if window == "gaussian" else UNIFORM
    if image.shape != reference.shape or min(image.shape[-2:]) < size:
        raise ValueError(
            f"ssim: image {image.shape} and reference {reference.shape} must be equal in shape, at least {size} a side"
        )
    image, reference = (jnp.asarray(a, jnp.result_type(a, jnp.float32)) for a in (image, reference))
    peak = jnp.abs(reference).max((-2, -1)) if peak is None else jnp.asarray(peak)
    c1, c2 = ((k * peak[..., None, None]) ** 2 for k in (K1, K2))
    weights = np.exp(-(((np.arange(size) - size // 2) / SIGMA) ** 2) / 2) if window == "gaussian" else np.ones(size)
    weights = weights / weights.sum()
    scale = 1.0 if window == "gaussian" else size**2 / (size**2 - 1)
    local = lambda a: _filtered(a, weights)
    mean_x, mean_y = local(image), local(reference)
    var_x = scale * (local(image**2) - mean_x**2)
    var_y = scale * (local(reference**2) - mean_y**2)
    both = scale * (local(image * reference) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * both + c2) / (var_x + var_y + c2)).mean((-2, -1))


def _filtered(a: jax.Array, weights: np.ndarray) -> jax.Array:
    """`(..., h, w)` averaged with the outer product of weights, where the window lies within."""
    x = a.reshape(-1, 1, *a.shape[-2:])
    w = jnp.asarray(weights, x.dtype)
    for kernel in (w[None, None, :, None], w[None, None, None, :]):
        x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", precision=lax.Precision.HIGHEST)
    return x.reshape(*a.shape[:-2], *x.shape[-2:])
