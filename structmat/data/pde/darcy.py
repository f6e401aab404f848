"""Steady flow through a medium of two permeabilities: -div(a grad u) = 1 on [0, 1]^2, u = 0 on the edges.

The data set of Li et al., ICLR 2021, on grid points that include the edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

from structmat.data.errors import DataError
from structmat.data.pde.random_fields import neumann_field
from structmat.data.pde.spec import Spec
from structmat.data.pde.store import BATCH, FieldSet, load

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
"""Relative residual at which the iteration stops; twice that of rounding at 421 x 421."""


@jax.jit
def solve_darcy(coefficient: jax.Array, source: float | jax.Array = 1.0) -> jax.Array:
    """(n, n): the solution, zero on the edges.

    Five-point finite volumes with the mean of two neighbours between them, as in the data set's own solver. Solved by
    conjugate gradients preconditioned from both sides by the Laplacian, which the sine transform diagonalises: the condition
    number is at most max(a) / min(a) on every grid, so two permeabilities of ratio 4 take about a dozen iterations.

    Args:
      coefficient: a > 0 at the points i / (n - 1), (n, n); float32 or float64, which is also the precision of the solver.
      source: the right-hand side, a number or (n, n); its edges are not used.
    """
    n, real = coefficient.shape[-1], coefficient.dtype
    m = n - 2
    points = np.arange(1, m + 1)
    sines = jnp.asarray(np.sqrt(2 / (m + 1)) * np.sin(np.pi * np.outer(points, points) / (m + 1)), real)
    eigenvalues = (2 * (n - 1) * np.sin(np.pi * points / (2 * (m + 1)))) ** 2
    scale = jnp.asarray((eigenvalues[:, None] + eigenvalues) ** -0.5, real)
    down = (coefficient[1:, 1:-1] + coefficient[:-1, 1:-1]) * ((n - 1) ** 2 / 2)
    right = (coefficient[1:-1, 1:] + coefficient[1:-1, :-1]) * ((n - 1) ** 2 / 2)

    def turned(field: jax.Array) -> jax.Array:
        return jnp.einsum("ki,ij,jl->kl", sines, field, sines, precision=jax.lax.Precision.HIGHEST)

    def product(modes: jax.Array) -> jax.Array:
        u = turned(scale * modes)
        vertical = jnp.diff(down * jnp.diff(jnp.pad(u, ((1, 1), (0, 0))), axis=0), axis=0)
        horizontal = jnp.diff(right * jnp.diff(jnp.pad(u, ((0, 0), (1, 1))), axis=1), axis=1)
        return -scale * turned(vertical + horizontal)

    inner = jnp.broadcast_to(jnp.asarray(source, real), (n, n))[1:-1, 1:-1]
    modes, _ = cg(product, scale * turned(inner), tol=TOLERANCE[real.name], maxiter=1000)
    return jnp.pad(turned(scale * modes), 1)


@dataclass(frozen=True, kw_only=True)
class Darcy(Spec):
    """Pairs of permeability and pressure; the pressure is the one snapshot.

    The paper: permeability `high` where a random field is not negative, `low` elsewhere, solved at 421 x 421.

    Attributes:
      alpha, tau: of the random field, see `neumann_field`.
    """

    high: float = 12.0
    low: float = 3.0
    alpha: float = 2.0
    tau: float = 3.0

    dimensions: ClassVar[int] = 2
    periodic: ClassVar[bool] = False
    kind: ClassVar[str] = "darcy"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high <= 0 or self.low <= 0:
            raise DataError(f"permeabilities must be above 0, got {self.high} and {self.low}")

    @property
    def times(self) -> np.ndarray:
        """float64 (1,): the solution is steady."""
        return np.array([np.inf])

    def describe(self) -> str:
        """For people."""
        return f"Darcy flow, permeability {self.high:g} and {self.low:g}"

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Permeability (n, n) and pressure (1, n, n), n = solve_resolution."""
        dtype = jnp.dtype(self.dtype)
        field = neumann_field(key, self.solved, alpha=self.alpha, tau=self.tau, modes=self.modes, dtype=dtype)
        coefficient = jnp.where(field >= 0, self.high, self.low).astype(dtype)
        return coefficient, solve_darcy(coefficient)[None]


def darcy_set(
    seed: int, samples: int, resolution: int, *, folder: str | Path | None = None, batch: int = BATCH, **options: Any
) -> FieldSet:
    """`load` of the `Darcy` of these arguments and options."""
    return load(Darcy(seed=seed, samples=samples, resolution=resolution, **options), folder, batch)
