"""The registry of figures, and what a figure counts.

A figure is one function in a file `r<number>_<word>.py` of this package; the command finds it by the file's name:

    @figure("R3", "SIGTERM: saved within a step, exit 0", least=10)
    def sigterm(trial: Trial) -> None:
        trial.check("at 0.3 s", ok=code == 0, why=f"exit code {code}")
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Row:
    """Counts of one line of the table.

    Attributes:
      id: such as R1. title: what holds. least: cases demanded. share: of the cases tried, what has to hold.
      tried: cases. failures: "case: why" of each that did not hold. notes: JSON values worth a glance.
    """

    id: str
    title: str
    least: int = 1
    share: float = 1.0
    tried: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def held(self) -> int:
        """Cases that held."""
        return self.tried - len(self.failures)

    @property
    def ok(self) -> bool:
        """Whether enough was tried and enough held."""
        return self.tried >= self.least and self.held >= self.share * self.tried

    def check(self, case: str, ok: bool, why: str = "") -> bool:
        """Count a case; `case` and `why` are kept if it did not hold. Returns `ok`."""
        self.tried += 1
        if not ok:
            self.failures.append(f"{case}: {why}" if why else case)
        return bool(ok)


class Trial:
    """One run of a figure.

    Args:
      figure: what is tried.
      seed: of everything random; `random` is drawn from it and the figure's key.
      folder: empty, of this figure alone.
    """

    def __init__(self, figure: Figure, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.random = random.Random(f"{seed} {figure.key}")
        self.rows = [Row(figure.key.split()[0], figure.title, figure.least)]
        self.check, self.notes = self.rows[0].check, self.rows[0].notes

    def row(self, id: str, title: str, least: int = 1, share: float = 1.0) -> Row:
        """A further line of the table."""
        self.rows.append(Row(id, title, least, share))
        return self.rows[-1]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A registered figure; `key` is its id, with a further word where an id has several."""

    key: str
    title: str
    least: int
    run: Callable[[Trial], None]


FIGURES: dict[str, Figure] = {}
"""By key, filled by `load_all`."""


def figure(key: str, title: str, least: int = 1) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a function of a Trial that tries `least` cases or more."""

    def register(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        FIGURES[key] = Figure(key, title, least, run)
        return run

    return register


def load_all() -> dict[str, Figure]:
    """Import every `r<number>_*.py` here; the figures in the order of their numbers."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if re.match(r"r\d+_", module.name):
            importlib.import_module(f"{__package__}.{module.name}")
    number = lambda key: int(re.match(r"R(\d+)", key)[1])
    return dict(sorted(FIGURES.items(), key=lambda item: number(item[0])))
