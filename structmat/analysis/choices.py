"""What `choose` found: one Choice per weight, candidate and budget; ranked, tabulated, plotted, turned into rules."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from structmat.analysis.pages import page_of
from structmat.structures import Structure, StructureError, parse
from structmat.structures.errors import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.box import Box
    from rich.table import Table

ROUNDING = 1e-6
"""Relative errors below this count as equal to it, in ranks and in means."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One candidate at one budget for one weight.

    Attributes:
      path, shape: of the weight.
      candidate: what was asked for, in short text; budget: the fraction of dense it was allowed.
      structure: canonical text of the member taken; error: its relative Frobenius error, weighted by the gram if any.
      bits, params, flops: what it takes, as fractions of dense.
      seconds: wall time of the projection, compilation included.
      gram: how much of the gram the projection used, `full`, `diagonal` or `none`; empty if none was given.
      optimal: whether the projection is the proven optimum of this error.
      reason: why the candidate does not fit; all fields from `structure` on are then unset.
    """

    path: str
    shape: tuple[int, int]
    candidate: str
    budget: float
    structure: str = ""
    error: float | None = None
    bits: float | None = None
    params: float | None = None
    flops: float | None = None
    seconds: float | None = None
    gram: str = ""
    optimal: bool = False
    reason: str = ""

    @property
    def short(self) -> str:
        """The member without arguments at their default."""
        return parse(self.structure).short()


@dataclasses.dataclass(frozen=True)
class Standing:
    """One candidate at one budget over all weights.

    Attributes:
      error: geometric mean of the errors over the `fits` weights it fits, None if there are none.
      wins: weights on which it is the best. weights: how many there are.
      bits, params, flops: of those weights together, as fractions of dense; seconds: their sum.
      optimal: whether every projection is the proven optimum. gram: what they used of the grams.
    """

    candidate: str
    budget: float
    error: float | None
    wins: int
    fits: int
    weights: int
    bits: float | None
    params: float | None
    flops: float | None
    seconds: float
    optimal: bool
    gram: str


@dataclasses.dataclass(frozen=True, repr=False)
class Choices:
    """The result of `choose`; prints as a ranked table.

    Attributes:
      rows: every Choice, in the order they were made.
      metric: what was budgeted. budgets: ascending.
    """

    rows: tuple[Choice, ...]
    metric: str
    budgets: tuple[float, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The weights, in the order given."""
        return tuple(dict.fromkeys(row.path for row in self.rows))

    def ranked(self, path: str | None = None, budget: float | None = None) -> list[Choice]:
        """The Choices of one weight at one budget, best first, those that do not fit last; ties go to what costs less.

        Args:
          path, budget: may be left out where there is only one.
        """
        path, budget = self._path(path), self._budget(budget)
        rows = [row for row in self.rows if (row.path, row.budget) == (path, budget)]
        return sorted(
            rows, key=lambda r: (math.inf,) if r.reason else (max(r.error, ROUNDING), getattr(r, self.metric))
        )

    def best(self, path: str | None = None, budget: float | None = None) -> Choice:
        """The Choice of least error.

        Raises:
          StructureError: an unknown path or budget, or no candidate fits.
        """
        first = self.ranked(path, budget)[0]
        if first.reason:
            raise StructureError(f"no candidate fits {first.path!r} at budget {first.budget:g}; {first.reason}")
        return first

    def standings(self, budget: float | None = None) -> list[Standing]:
        """Candidates over all weights: those that fit most weights first, then by geometric mean of the error."""
        budget = self._budget(budget)
        firsts = [self.ranked(path, budget)[0] for path in self.paths]
        wins = [row.candidate for row in firsts if not row.reason]
        groups: dict[str, list[Choice]] = {}
        for row in self.rows:
            if row.budget == budget:
                groups.setdefault(row.candidate, []).append(row)
        found = [_standing(rows, wins.count(candidate)) for candidate, rows in groups.items()]
        return sorted(found, key=lambda s: (-s.fits, s.error if s.fits else 0.0))

    def rules(self, budget: float | None = None, candidate: str | Structure | None = None) -> str:
        """`regex -> structure; ...` for a config's `structure`: each weight's best, or one candidate everywhere it fits.

        Raises:
          StructureError: an unknown candidate, or nothing fits.
        """
        budget, wanted = self._budget(budget), None if candidate is None else parse(candidate).short()
        if wanted is not None and wanted not in (known := {row.candidate for row in self.rows}):
            raise StructureError(f"candidate {wanted!r} was not tried{suggest(wanted, known)}")
        taken: dict[str, list[str]] = {}
        for path in self.paths:
            ranked = [r for r in self.ranked(path, budget) if not r.reason and wanted in (None, r.candidate)]
            if ranked:
                taken.setdefault(ranked[0].short, []).append(path)
        if not taken:
            raise StructureError(f"{wanted or 'no candidate'} fits no weight at budget {budget:g}")
        return "; ".join(f"{'|'.join(map(_pattern, paths))} -> {text}" for text, paths in taken.items())

    def to_json(self) -> str:
        """Everything, as JSON that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Choices:
        """What `to_json` wrote."""
        fields = json.loads(text)
        rows = tuple(Choice(**row | {"shape": tuple(row["shape"])}) for row in fields["rows"])
        return Choices(rows, fields["metric"], tuple(fields["budgets"]))

    def table(self, path: str | None = None, budget: float | None = None, box: Box | None = None) -> Table:
        """A rich table at one budget: of one weight, or of all together where `path` is left out and there are several."""
        from rich import box as boxes
        from rich.table import Table

        alone = path is not None or len(self.paths) == 1
        rows = self.ranked(path, budget) if alone else self.standings(budget)
        grams = any(row.gram for row in rows)
        names = [
            "",
            "structure",
            "error",
            *([] if alone else ["wins", "fits"]),
            "bits",
            "params",
            "FLOPs",
            "projection",
        ]
        table = Table(box=box or boxes.SIMPLE_HEAD)
        for name in [*names, *(["gram"] if grams else []), "seconds"]:
            table.add_column(name, justify="left" if name in ("structure", "projection", "gram") else "right")
        for place, row in enumerate((r for r in rows if r.error is not None), 1):
            many = [] if alone else [str(row.wins), f"{row.fits}/{row.weights}"]
            shares = [f"{row.bits:.1%}", f"{row.params:.1%}", f"{row.flops:.1%}"]
            kind = ["optimal" if row.optimal else "heuristic", *([row.gram] if grams else [])]
            text = row.short if alone else row.candidate
            table.add_row(str(place), text, f"{row.error:.4f}", *many, *shares, *kind, f"{row.seconds:.2f}")
        return table

    def overview(self, box: Box | None = None) -> Table:
        """A rich table of all budgets: geometric mean error (wins); best at the largest budget first."""
        from rich import box as boxes
        from rich.table import Table

        table = Table("structure", box=box or boxes.SIMPLE_HEAD)
        for budget in self.budgets:
            table.add_column(f"{self.metric} {budget:g}", justify="right")
        found = {(s.candidate, s.budget): s for b in self.budgets for s in self.standings(b)}
        for standing in self.standings(self.budgets[-1]):
            cells = []
            for budget in self.budgets:
                s = found[standing.candidate, budget]
                partly = f" on {s.fits}/{s.weights}" if s.fits < s.weights else ""
                cells.append(f"{s.error:.4f} ({s.wins}){partly}" if s.fits else "-")
            if any(cell != "-" for cell in cells):
                table.add_row(standing.candidate, *cells)
        return table

    def refusals(self, budget: float | None = None) -> list[str]:
        """One line per candidate that does not fit somewhere, with the first reason and how many more there are."""
        told: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason and row.budget == (budget or row.budget):
                told.setdefault(row.candidate, []).append(row.reason)
        more = lambda reasons: f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return [f"{candidate}: {reasons[0]}{more(reasons)}" for candidate, reasons in told.items()]

    def plot(self, path: str | None = None, top: int = 10) -> Figure:
        """Error against the budget taken, a curve per candidate, of one weight or all together; see `error_curve`."""
        from structmat.analysis.plots import error_curve

        curves: dict[str, list[tuple[float, float]]] = {}
        for budget in self.budgets:
            rows = self.standings(budget) if path is None else self.ranked(path, budget)
            for row in rows:
                if row.error is not None and getattr(row, "fits", 1) == getattr(row, "weights", 1):
                    curves.setdefault(row.candidate, []).append((getattr(row, self.metric), row.error))
        what = f"{self.metric}, fraction of dense"
        many = "" if path is not None or len(self.paths) == 1 else f", geometric mean of {len(self.paths)} weights"
        return error_curve(curves, what, f"relative error{many}", top)

    def __repr__(self) -> str:

        page = io.StringIO()
        console = page_of(page, 140)
        sizes = f"{len(self.paths)} weights" if len(self.paths) > 1 else f"{self.paths[0]} {self.rows[0].shape}"
        text = ", ".join(f"{b:g}" for b in self.budgets)
        console.print(f"Choices({sizes}, budget {text} of dense {self.metric})", markup=False, highlight=False)
        console.print(self.table() if len(self.budgets) == 1 else self.overview())
        lines = self.refusals()
        if lines:
            console.print("does not fit:\n  " + "\n  ".join(lines), markup=False, highlight=False, soft_wrap=True)
        return page.getvalue().rstrip()

    def _path(self, path: str | None) -> str:
        if path is None and len(self.paths) == 1:
            return self.paths[0]
        if path not in self.paths:
            raise StructureError(f"which weight? got {path!r}{suggest(str(path), self.paths)}")
        return path

    def _budget(self, budget: float | None) -> float:
        if budget is None and len(self.budgets) == 1:
            return self.budgets[0]
        if budget not in self.budgets:
            raise StructureError(f"which budget? got {budget!r}; valid: {', '.join(map(str, self.budgets))}")
        return budget


def _standing(rows: list[Choice], wins: int) -> Standing:
    fitting = [row for row in rows if not row.reason]
    size = lambda row: math.prod(row.shape)
    total = sum(map(size, fitting))
    share: Callable[[str], Any] = lambda name: (
        sum(getattr(r, name) * size(r) for r in fitting) / total if total else None
    )
    return Standing(
        candidate=rows[0].candidate,
        budget=rows[0].budget,
        error=_geometric_mean(max(r.error, ROUNDING) for r in fitting) if fitting else None,
        wins=wins,
        fits=len(fitting),
        weights=len(rows),
        bits=share("bits"),
        params=share("params"),
        flops=share("flops"),
        seconds=sum(r.seconds for r in fitting),
        optimal=all(r.optimal for r in fitting),
        gram="/".join(dict.fromkeys(r.gram for r in fitting if r.gram)),
    )


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def _pattern(path: str) -> str:
    """A regex of exactly this path that holds nothing a list of rules is split at."""
    return "".join(f"\\x{ord(c):02x}" if c in ";>| \t\r\n" else re.escape(c) for c in path)
