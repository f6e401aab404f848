"""What a table's runs came to: figures over seeds, costs, verdicts."""

from __future__ import annotations

import dataclasses
import functools
import json

from ml_collections import ConfigDict

from experiments.tables.judge import Verdict, judge
from experiments.tables.plan import Plan, Row
from experiments.tables.schema import Claim, TableError
from experiments.tables.store import Result, Store
from experiments.tables.timing import Times, known_times
from structmat.training.config import validate
from structmat.training.switch import ended


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a model at an arm's config: parameters of all of it, bits of them as stored, FLOPs of a forward pass per unit, and
    how its structured products are computed in training (factored, dense, or mixed)."""

    params: int
    bits: int
    flops: int
    path: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A row with its results, one per seed in order; a seed not run yet is None."""

    row: Row
    results: tuple[Result | None, ...]

    def figure(self, result: Result, name: str) -> float | None:
        """The held-out figure of a run that ended, None where its model or method has none of that name."""
        prefix = self.row.arm.reference
        return result.record.metrics["reference"].get(f"{prefix}_{name}") if prefix else result.heldout.get(name)

    def figures(self, name: str) -> list[float]:
        """The held-out figure of every seed that ended and has it."""
        found = [self.figure(r, name) for r in self.results if r and not r.failed]
        return [value for value in found if value is not None]

    @property
    def diverged(self) -> int:
        """Seeds that stopped on non-finite losses."""
        return sum(bool(r and r.failed) for r in self.results)

    @property
    def memory(self) -> int | None:
        """Bytes a device needs for the compiled step: state, batch and temporaries."""
        return max((r.record.metrics["step_bytes"] for r in self.results if r and not r.failed), default=None)


@dataclasses.dataclass(frozen=True)
class Results:
    """A plan with what has been run and timed of it."""

    plan: Plan
    lines: tuple[Line, ...]
    times: Times | None = None

    def line(self, name: str) -> Line:
        """Of an arm."""
        return next(line for line in self.lines if line.row.arm.name == name)

    def verdict(self, claim: Claim) -> Verdict | None:
        """Judged on the seeds both arms ended; None where there is none."""
        metric, lines = claim.metric or self.plan.base.metric, (self.line(claim.better), self.line(claim.worse))
        both = [pair for pair in zip(*(line.results for line in lines)) if all(r and not r.failed for r in pair)]
        if not both:
            return None
        better, worse = ([_known(line, pair[i], metric) for pair in both] for i, line in enumerate(lines))
        return judge(better, worse, self.plan.base.lower, claim.within)


def _known(line: Line, result: Result, metric: str) -> float:
    value = line.figure(result, metric)
    if value is None:
        raise TableError(f"arm {line.row.arm.name!r}: its runs have no held-out figure {metric!r}")
    return value


def results_of(plan: Plan, store: Store) -> Results:
    """What the store has of a plan."""
    lines = tuple(Line(row, tuple(store.read(run.key) for run in row.runs)) for row in plan.rows)
    return Results(plan, lines, known_times(plan.table, plan.scale, store))


def cost_of(config: ConfigDict) -> Cost:
    """What an arm's model costs: the one that is evaluated, where a switch at the end of the run makes it."""
    return _cost_of(config.to_json())


@functools.cache
def _cost_of(text: str) -> Cost:
    config = ConfigDict(json.loads(text))
    task = ended(config, validate(config, devices=1))
    sites = task.table.values()
    rest = task.params - sum(site.bound.params for site in sites)
    bits = sum(site.bound.cost(1).bits for site in sites) + 32 * rest
    return Cost(task.params, bits, task.flops(), task.path)
