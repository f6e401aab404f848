"""Forced two-dimensional flow on the torus: Navier-Stokes in vorticity form, pseudo-spectral.

w_t + u . grad w = nu Laplacian w + f on [0, 1)^2, u = (psi_y, -psi_x), -Laplacian psi = w: the equation, forcing, initial
fields and time stepping of Li et al., ICLR 2021, also used for MG-TFNO (Kossaifi et al., TMLR 2024) and Monarch (Dao et al.,
ICML 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from structmat.data.pde.random_fields import torus_field
from structmat.data.pde.spec import Flow
from structmat.data.pde.spectral import unaliased, wavenumbers
from structmat.data.pde.steps import steps_between
from structmat.data.pde.store import BATCH, FieldSet, load


def standard_forcing(size: int, amplitude: float = 0.1, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(size, size): amplitude (sin 2 pi (x + y) + cos 2 pi (x + y))."""
    x = np.arange(size) / size
    angle = 2 * np.pi * (x[:, None] + x)
    return jnp.asarray(amplitude * (np.sin(angle) + np.cos(angle)), dtype)


def solve_navier_stokes(
    vorticity: jax.Array,
    viscosity: float | jax.Array,
    time: float,
    dt: float,
    snapshots: int = 1,
    forcing: jax.Array | None = None,
) -> jax.Array:
    """(..., snapshots, n, n): the vorticity at time / snapshots, 2 time / snapshots, ..., time.

    Crank-Nicolson for diffusion and an explicit Euler step for the rest: first order in dt. The nonlinear term is made of
    wavenumbers below n / 3 only (2/3 rule), so it is free of aliasing and neither makes nor destroys enstrophy. Stable while
    dt max|u| is well below 1 / n.

    Args:
      vorticity: (..., n, n) of mean zero, at time 0; float32 or float64, which is also the precision of the solver.
      forcing: broadcasts to vorticity; none if None.

    Raises:
      DataError: dt does not divide the time between snapshots.
    """
    steps = steps_between(time, dt, snapshots)
    forcing = jnp.zeros_like(vorticity) if forcing is None else jnp.asarray(forcing, vorticity.dtype)
    return _advance(vorticity, forcing, viscosity, time / (steps * snapshots), steps, snapshots)


@partial(jax.jit, static_argnames=("steps", "snapshots"))
def _advance(
    vorticity: jax.Array, forcing: jax.Array, viscosity: jax.Array, dt: jax.Array, steps: int, snapshots: int
) -> jax.Array:
    n, real = vorticity.shape[-1], vorticity.dtype
    kx, ky = (2 * np.pi * k for k in wavenumbers(n, 2))
    laplacian = kx**2 + ky**2
    inverse = np.divide(1, laplacian, out=np.zeros_like(laplacian), where=laplacian > 0)
    kept = unaliased(n, 2)
    # velocity and gradient of vorticity, each out of the vorticity's modes
    factors = np.stack([ky * inverse, -kx * inverse, kx + 0 * ky, ky + 0 * kx]) * kept
    factors = jnp.asarray(1j * factors, jnp.result_type(real, jnp.complex64))
    factors = factors.reshape(4, *(1,) * (vorticity.ndim - 2), *laplacian.shape)
    half = jnp.asarray(laplacian, real) * (0.5 * dt * viscosity)
    push = dt * jnp.fft.rfft2(forcing)
    mask = jnp.asarray(dt * kept, real)

    def step(_: int, w: jax.Array) -> jax.Array:
        u, v, w_x, w_y = jnp.fft.irfft2(factors * w, (n, n))
        return ((1 - half) * w - mask * jnp.fft.rfft2(u * w_x + v * w_y) + push) / (1 + half)

    def record(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        w = jax.lax.fori_loop(0, steps, step, w)
        return w, jnp.fft.irfft2(w, (n, n))

    return jnp.moveaxis(jax.lax.scan(record, jnp.fft.rfft2(vorticity), None, snapshots)[1], 0, -3)


@dataclass(frozen=True, kw_only=True)
class NavierStokes(Flow):
    """Pairs of initial vorticity and the vorticity at `snapshots` times up to `time`.

    The papers: viscosity 1e-3, 1e-4, 1e-5 to time 50, 30, 20, solved at 256 x 256 with dt 1e-4, kept at 64 x 64.

    Attributes:
      forcing: amplitude of `standard_forcing`. alpha, tau: of the initial field, see `torus_field`.
    """

    viscosity: float
    forcing: float = 0.1
    alpha: float = 2.5
    tau: float = 7.0

    dimensions: ClassVar[int] = 2
    periodic: ClassVar[bool] = True
    kind: ClassVar[str] = "navier_stokes"
    version: ClassVar[int] = 1

    def describe(self) -> str:
        """For people."""
        return f"vorticity on the torus, viscosity {self.viscosity:g}, forcing {self.forcing:g}, time {self.time:g}"

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Initial (n, n) and later (snapshots, n, n) vorticity, n = solve_resolution."""
        n, dtype = self.solved, jnp.dtype(self.dtype)
        start = torus_field(key, n, 2, alpha=self.alpha, tau=self.tau, modes=self.modes, dtype=dtype)
        push = standard_forcing(n, self.forcing, dtype)
        return start, solve_navier_stokes(start, self.viscosity, self.time, self.dt, self.snapshots, push)


def navier_stokes_set(
    seed: int,
    samples: int,
    resolution: int,
    viscosity: float,
    time: float,
    dt: float,
    snapshots: int = 1,
    *,
    folder: str | Path | None = None,
    batch: int = BATCH,
    **options: Any,
) -> FieldSet:
    """`load` of the `NavierStokes` of these arguments and options."""
    spec = NavierStokes(
        seed=seed,
        samples=samples,
        resolution=resolution,
        viscosity=viscosity,
        time=time,
        dt=dt,
        snapshots=snapshots,
        **options,
    )
    return load(spec, folder, batch)
