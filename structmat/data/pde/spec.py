"""What a set of solutions is made of: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import jax
import numpy as np

from structmat.data.errors import DataError
from structmat.data.pde.coarse import check_coarser
from structmat.data.pde.steps import steps_between

DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """Base of the equations; sample i depends on (seed, i) alone, so a smaller set is the start of a larger one.

    Attributes:
      resolution: points a side that are kept.
      solve_resolution: points a side that are solved for, of which the kept are every so many; `resolution` if None.
      modes: of the random field, see `random_fields`; `solve_resolution` if None. Set it to solve for the same random fields
        on several grids.
      dtype: of solver and data, float32 or float64.
      dimensions, periodic, kind, version: of the equation; the version goes up when its solver gives other numbers.
    """

    seed: int
    samples: int
    resolution: int
    solve_resolution: int | None = None
    modes: int | None = None
    dtype: str = "float32"

    dimensions: ClassVar[int]
    periodic: ClassVar[bool]
    kind: ClassVar[str]
    version: ClassVar[int]

    def __post_init__(self) -> None:
        if self.seed < 0 or self.samples < 1:
            raise DataError(f"seed {self.seed} and {self.samples} samples; there must be a seed >= 0 and a sample")
        if self.resolution < 4:
            raise DataError(f"a grid needs at least 4 points a side, got {self.resolution}")
        if self.dtype not in DTYPES:
            raise DataError(f"solutions are {' or '.join(DTYPES)}, not {self.dtype!r}")
        if self.modes is not None and not 1 <= self.modes <= self.solved:
            raise DataError(f"modes {self.modes} of a random field on {self.solved} points a side; valid: up to these")
        check_coarser(self.solved, self.resolution, self.periodic)

    @property
    def solved(self) -> int:
        """Points a side of the solver's grid."""
        return self.solve_resolution or self.resolution

    @property
    def name(self) -> str:
        """`darcy-1f0c...`: the kind and a hash of the version and every field."""
        return f"{self.kind}-{hashlib.sha256(self.text.encode()).hexdigest()[:16]}"

    @property
    def text(self) -> str:
        """JSON of kind, version and every field; the same for 8 and 8.0, and for a default and its value."""
        given = {f.name: float(v) if f.type == "float" else v for f in fields(self) for v in [getattr(self, f.name)]}
        grids = {"solve_resolution": self.solved, "modes": self.modes or self.solved}
        return json.dumps({"kind": self.kind, "version": self.version, **given, **grids}, sort_keys=True)

    @property
    @abstractmethod
    def times(self) -> np.ndarray:
        """float64 (snapshots,): of the outputs."""

    @abstractmethod
    def describe(self) -> str:
        """For people."""

    @abstractmethod
    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One input (*grid) and its outputs (snapshots, *grid) on the solver's grid; traceable."""


@dataclass(frozen=True, kw_only=True)
class Flow(Spec):
    """Of an equation in time: outputs are its fields at `snapshots` equally spaced times up to `time`, in steps of dt."""

    time: float
    dt: float
    snapshots: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        steps_between(self.time, self.dt, self.snapshots)

    @property
    def times(self) -> np.ndarray:
        """float64 (snapshots,)."""
        return self.time * np.arange(1, self.snapshots + 1) / self.snapshots
