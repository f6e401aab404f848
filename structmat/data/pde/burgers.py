"""Viscous Burgers on the circle, u_t + u u_x = nu u_xx on [0, 1), pseudo-spectral; the data set of Li et al., ICLR 2021."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from structmat.data.pde.random_fields import torus_field
from structmat.data.pde.spec import Flow
from structmat.data.pde.spectral import unaliased, wavenumbers
from structmat.data.pde.steps import steps_between
from structmat.data.pde.store import BATCH, FieldSet, load


def solve_burgers(
    velocity: jax.Array, viscosity: float | jax.Array, time: float, dt: float, snapshots: int = 1
) -> jax.Array:
    """(..., snapshots, n): the velocity at time / snapshots, 2 time / snapshots, ..., time.

    Diffusion exactly, by an integrating factor, the rest by the classical Runge-Kutta method: fourth order in dt. Wavenumbers
    below n / 3 only enter the nonlinear term (2/3 rule). Stable while dt max|u| n is below 1.3.

    Args:
      velocity: (..., n) at time 0; float32 or float64, which is also the precision of the solver.

    Raises:
      DataError: dt does not divide the time between snapshots.
    """
    steps = steps_between(time, dt, snapshots)
    return _advance(velocity, viscosity, time / (steps * snapshots), steps, snapshots)


@partial(jax.jit, static_argnames=("steps", "snapshots"))
def _advance(velocity: jax.Array, viscosity: jax.Array, dt: jax.Array, steps: int, snapshots: int) -> jax.Array:
    n, real = velocity.shape[-1], velocity.dtype
    (k,), kept = wavenumbers(n, 1), unaliased(n, 1)
    half = jnp.exp(jnp.asarray(-0.5 * (2 * np.pi * k) ** 2, real) * (dt * viscosity))
    whole = half**2
    slope = jnp.asarray(-1j * np.pi * k * kept, jnp.result_type(real, jnp.complex64)) * dt

    def change(u: jax.Array) -> jax.Array:
        return slope * jnp.fft.rfft(jnp.fft.irfft(jnp.where(kept, u, 0), n) ** 2)

    def step(_: int, u: jax.Array) -> jax.Array:
        a = change(u)
        b = change(half * (u + a / 2))
        c = change(half * u + b / 2)
        d = change(whole * u + half * c)
        return whole * u + (whole * a + 2 * half * (b + c) + d) / 6

    def record(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        u = jax.lax.fori_loop(0, steps, step, u)
        return u, jnp.fft.irfft(u, n)

    return jnp.moveaxis(jax.lax.scan(record, jnp.fft.rfft(velocity), None, snapshots)[1], 0, -2)


@dataclass(frozen=True, kw_only=True)
class Burgers(Flow):
    """Pairs of initial velocity and the velocity at `snapshots` times up to `time`.

    Li et al. 2021: covariance 625 (25 - Laplacian)^-2, viscosity 0.1, time 1, solved at 8192 points.

    Attributes:
      alpha, tau, sigma: of the initial field, see `torus_field`.
    """

    viscosity: float = 0.1
    time: float = 1.0
    dt: float = 1e-3
    alpha: float = 2.0
    tau: float = 5.0
    sigma: float = 25.0

    dimensions: ClassVar[int] = 1
    periodic: ClassVar[bool] = True
    kind: ClassVar[str] = "burgers"
    version: ClassVar[int] = 1

    def describe(self) -> str:
        """For people."""
        return f"Burgers on the circle, viscosity {self.viscosity:g}, time {self.time:g}"

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Initial (n,) and later (snapshots, n) velocity, n = solve_resolution."""
        field = {"alpha": self.alpha, "tau": self.tau, "sigma": self.sigma, "modes": self.modes}
        start = torus_field(key, self.solved, 1, dtype=jnp.dtype(self.dtype), **field)
        return start, solve_burgers(start, self.viscosity, self.time, self.dt, self.snapshots)


def burgers_set(
    seed: int, samples: int, resolution: int, *, folder: str | Path | None = None, batch: int = BATCH, **options: Any
) -> FieldSet:
    """`load` of the `Burgers` of these arguments and options."""
    return load(Burgers(seed=seed, samples=samples, resolution=resolution, **options), folder, batch)
