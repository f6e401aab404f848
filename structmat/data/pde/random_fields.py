"""Gaussian random fields: the random initial vorticities, velocities and permeabilities of the operator-learning data sets.

Normalised as `random_fields.py`, `GRF.m` and `GRF1.m` of Li et al., "Fourier Neural Operator for Parametric Partial
Differential Equations", ICLR 2021. White noise is drawn on a grid of `modes` points a side, so a field drawn with the same
key and `modes` is the same function on every grid that is not coarser.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from structmat.data.errors import DataError
from structmat.data.pde.spectral import refined, wavenumbers


def torus_amplitude(size: int, dimensions: int, alpha: float, tau: float, sigma: float) -> np.ndarray:
    """float64, in rfftn layout: sigma (4 pi^2 |k|^2 + tau^2)^(-alpha / 2), and 0 for the mean."""
    squares = sum(k**2 for k in wavenumbers(size, dimensions))
    return np.where(squares > 0, sigma * (4 * np.pi**2 * squares + tau**2) ** (-alpha / 2), 0.0)


def torus_field(
    key: jax.Array,
    size: int,
    dimensions: int = 2,
    *,
    alpha: float = 2.5,
    tau: float = 7.0,
    sigma: float | None = None,
    modes: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """(size,) * dimensions: a periodic field of mean zero, of covariance sigma^2 (tau^2 - Laplacian)^(-alpha) on [0, 1)^d.

    The Fourier coefficient of wavenumber k (mean over the grid of u exp(-2 pi i k x)) has E|u_k|^2 = `torus_amplitude`^2.

    Args:
      sigma: tau^(alpha - dimensions / 2) if None, which makes the variance nearly independent of tau.
      modes: the grid of the noise, which has all wavenumbers below modes / 2; `size` if None.

    Raises:
      DataError: modes of more points than the grid has.
    """
    modes = size if modes is None else modes
    if modes > size:
        raise DataError(f"a field of {modes} modes a side needs a grid as fine, got {size} points")
    sigma = tau ** (alpha - dimensions / 2) if sigma is None else sigma
    axes = tuple(range(-dimensions, 0))
    noise = jnp.fft.rfftn(jax.random.normal(key, (modes,) * dimensions, dtype), axes=axes, norm="ortho")
    amplitude = jnp.asarray(torus_amplitude(modes, dimensions, alpha, tau, sigma), dtype)
    return jnp.fft.irfftn(
        refined(amplitude * noise, modes, size, dimensions), (size,) * dimensions, axes, norm="forward"
    )


def neumann_field(
    key: jax.Array,
    nodes: int,
    *,
    alpha: float = 2.0,
    tau: float = 3.0,
    modes: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """(nodes, nodes): covariance tau^(2 alpha - 2) (tau^2 - Laplacian)^(-alpha), zero normal derivative, mean zero.

    On the points i / (nodes - 1) of [0, 1]^2, edges included: a sum of cos(pi k x) cos(pi l y) over k, l < modes.

    Args:
      modes: `nodes` if None.
    """
    modes = nodes if modes is None else modes
    k = np.arange(modes)
    amplitude = tau ** (alpha - 1) * (np.pi**2 * (k[:, None] ** 2 + k**2) + tau**2) ** (-alpha / 2)
    amplitude[0, 0] = 0
    waves = np.sqrt(np.where(k > 0, 2, 1)) * np.cos(np.pi * np.outer(np.linspace(0, 1, nodes), k))
    noise = jnp.asarray(amplitude, dtype) * jax.random.normal(key, (modes, modes), dtype)
    waves = jnp.asarray(waves, dtype)
    return jnp.einsum("xk,kl,yl->xy", waves, noise, waves, precision=jax.lax.Precision.HIGHEST)
