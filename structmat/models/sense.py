"""SENSE: the image of several coils from undersampled k-space, by linear least squares (Pruessmann et al. 1999, 2001).

Measured is y_c = m F(s_c x), with sensitivities s_c, a mask m and the unitary Fourier transform F; k-space is in the order
of `jnp.fft`, zero frequency first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg


def unitary_ifft2(kspace: jax.Array) -> jax.Array:
    """The inverse Fourier transform of the last two axes."""
    return jnp.fft.ifft2(kspace, norm="ortho")


def forward(image: jax.Array, maps: jax.Array, mask: jax.Array) -> jax.Array:
    """A: image `(..., h, w)`, maps `(..., coils, h, w)` -> k-space `(..., coils, h, w)`, zero where the mask is."""
    return mask * jnp.fft.fft2(maps * image[..., None, :, :], norm="ortho")


def zero_filled(
    kspace: jax.Array,
    maps: jax.Array,
    mask: jax.Array,
    inverse: Callable[[jax.Array], jax.Array] = unitary_ifft2,
) -> jax.Array:
    """A^H: k-space `(..., coils, h, w)` -> image `(..., h, w)`, what was not sampled taken for zero.

    One step of SENSE without iterating; `inverse` is what `structmat.models.msense` replaces in it.
    """
    return (maps.conj() * inverse(mask * kspace)).sum(-3)


@jax.jit
def sense(
    kspace: jax.Array,
    maps: jax.Array,
    mask: jax.Array,
    weight: float | jax.Array = 0.0,
    iterations: int | jax.Array = 30,
    tolerance: float | jax.Array = 1e-6,
) -> jax.Array:
    """The minimiser of |A x - y|^2 + weight |x|^2 by conjugate gradients on (A^H A + weight) x = A^H y, matrix-free.

    Args:
      kspace: complex `(..., coils, h, w)`; leading axes are solved apart.
      maps: complex (coils, h, w). mask: (h, w), 0 or 1.
      weight: Tikhonov weight; noise of variance s^2 and an image of variance v per pixel want more than s^2 / v, as most
        of an image's energy is at low frequencies.
      iterations: at most; stopping early regularises as well.
      tolerance: stops where the residual of the normal equations is that fraction of |A^H y|.

    Returns:
      image `(..., h, w)`, complex.
    """

    def one(measured: jax.Array) -> jax.Array:
        normal = lambda x: zero_filled(forward(x, maps, mask), maps, mask) + weight * x
        return cg(normal, zero_filled(measured, maps, mask), tol=tolerance, maxiter=iterations)[0]

    return jnp.vectorize(one, signature="(c,h,w)->(h,w)")(kspace)
