"""Solutions of partial differential equations from our own solvers, as data sets that a seed decides."""

from structmat.data.pde.burgers import Burgers, burgers_set, solve_burgers
from structmat.data.pde.coarse import strided, truncated
from structmat.data.pde.darcy import Darcy, darcy_set, solve_darcy
from structmat.data.pde.navier_stokes import NavierStokes, navier_stokes_set, solve_navier_stokes, standard_forcing
from structmat.data.pde.random_fields import neumann_field, torus_amplitude, torus_field
from structmat.data.pde.spec import Spec
from structmat.data.pde.store import FieldSet, cache_folder, load

__all__ = [
    "Burgers",
    "Darcy",
    "FieldSet",
    "NavierStokes",
    "Spec",
    "burgers_set",
    "cache_folder",
    "darcy_set",
    "load",
    "navier_stokes_set",
    "neumann_field",
    "solve_burgers",
    "solve_darcy",
    "solve_navier_stokes",
    "standard_forcing",
    "strided",
    "torus_amplitude",
    "torus_field",
    "truncated",
]
