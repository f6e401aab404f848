"""Which runs a table needs: rates tried for every family, then every arm on every seed, each known by its content."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.equal import dense_small, of_share
from experiments.tables.bases import Base, base_of
from experiments.tables.schema import DENSE, LOW_RANK, SMALL, Arm, Table, TableError
from experiments.tables.store import Result, Store
from structmat.structures import Rules
from structmat.training.config import identity, validate
from structmat.training.record import content_key
from structmat.training.switch import ended
from structmat.training.tasks import TASKS

TUNE_SEED = 1000
"""Of the runs that choose a rate; none of the seeds that are compared."""
CLOSE = 0.005
"""Trials that end within this share of the best one's figure are taken as equal, for they have one seed; of these the lowest rate
is taken, for a shorter run favours higher ones."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      label: for people, such as `monarch, rate x2, seed 1000`. key: of its content: the same run in another table has it
      too. config: all of it.
    """

    label: str
    key: str
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm with its config at a scale.

    Attributes:
      tried: multiple of the base rate -> its trial, where the arm is tuned itself. rate: the best of them, None if not known
        yet.
    """

    arm: Arm
    config: ConfigDict
    tried: Mapping[float, Run]
    rate: float | None
    runs: tuple[Run, ...]

    @property
    def edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried."""
        return self.rate is not None and bool(self.tried) and self.rate in (min(self.tried), max(self.tried))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table at a scale, as far as results so far allow."""

    table: Table
    scale: str
    base: Base
    rows: tuple[Row, ...]

    def runs(self) -> list[Run]:
        """Every run that can be named so far, rates first, each once."""
        found = [run for row in self.rows for run in row.tried.values()] + [
            run for row in self.rows for run in row.runs
        ]
        return list({run.key: run for run in found}.values())

    def complete(self) -> bool:
        """Whether every row's rate is known, so that `runs` is all of them."""
        return all(row.runs for row in self.rows)

    def row(self, name: str) -> Row:
        """The row of an arm."""
        return next(row for row in self.rows if row.arm.name == name)


def plan(table: Table, scale: str, store: Store) -> Plan:
    """What the table needs at a scale, given the results there are.

    Raises:
      TableError: the table has no such scale. ConfigError: an arm is not a valid config.
    """
    base = base_at(table, scale)
    rates: dict[str, float | None] = {}
    tried: dict[str, Mapping[float, Run]] = {}
    for arm, config in arms_of(table, scale):
        if not arm.tuned_with:
            tried[arm.name], rates[arm.name] = _tuned(arm.name, config, base, store)
    rows = []
    for arm, config in arms_of(table, scale):
        rate = rates[arm.tuned_with or arm.name]
        runs = () if rate is None else tuple(_train(arm.name, config, base, rate, seed) for seed in range(base.seeds))
        rows.append(Row(arm, config, tried.get(arm.name, {}), rate, runs))
    return Plan(table, scale, base, tuple(rows))


def base_at(table: Table, scale: str) -> Base:
    """The table's base config at a scale.

    Raises:
      TableError: the table has no such scale.
    """
    if scale not in table.bases:
        raise TableError(f"table {table.name} has no scale {scale!r}; it has {', '.join(table.bases)}")
    return base_of(scale, table.bases[scale])


@functools.cache
def arms_of(table: Table, scale: str) -> tuple[tuple[Arm, ConfigDict], ...]:
    """Every arm with its config: the baselines first, sized by the table's reference arm.

    Raises:
      TableError: the table has no such scale, or names what is not there. ConfigError: an arm is not a valid config.
    """
    start = base_at(table, scale).make()
    place = lambda arm: f"table {table.name}, arm {arm.name!r}"
    own = [(arm, changed(start, arm.over(start, scale), place(arm))) for arm in table.arms]
    params = _size(table, scale, start, next(config for arm, config in own if arm.name == table.reference))
    paper = lambda name: dict(table.baselines_paper.get(name, {}))
    rows = [(Arm(DENSE, paper=paper(DENSE)), start)]
    small = dense_small(start, params)
    if small is not None and small.model.width < start.model.width:
        rows.append((Arm(SMALL, tuned_with=DENSE, paper=paper(SMALL)), small))
    if text := table.low_rank_at(scale):
        rows.append((Arm(LOW_RANK, paper=paper(LOW_RANK)), of_share(start, text, params)))
    names = [arm.name for arm, _ in (*rows, *own)]
    for claim in table.claims:
        for name in (claim.better, claim.worse):
            if name not in names:
                raise TableError(f"table {table.name}: arm {table.reference!r} saves nothing, so there is no {name!r}")
    return (*rows, *own)


def _size(table: Table, scale: str, dense: ConfigDict, reference: ConfigDict) -> int:
    """Parameters of the model that the baselines match."""
    share = table.share_at(scale)
    own = validate(reference, devices=1)
    if share is None:
        return ended(reference, own).params
    task = validate(dense, devices=1)
    others = [path for path, site in own.table.items() if site.bound.structure.name != "dense"]
    entries = sum(task.table[path].bound.dense_params for path in others)
    return task.params - round((1 - share) * entries)


def changed(config: ConfigDict, changes: Mapping[str, Any], place: str) -> ConfigDict:
    """A copy of the config with dotted fields replaced.

    Raises:
      TableError: no such field.
    """
    own = ConfigDict(config.to_dict())
    for field, value in changes.items():
        node: Any = own
        *groups, last = field.split(".")
        for group in groups:
            node = node.get(group)
            if not isinstance(node, ConfigDict):
                raise TableError(f"{place}: no field {field!r} in the config")
        if last not in node:
            raise TableError(f"{place}: no field {field!r} in the config")
        node[last] = ConfigDict(value.to_dict()) if isinstance(value, ConfigDict) else value
    return own


def _tuned(name: str, config: ConfigDict, base: Base, store: Store) -> tuple[Mapping[float, Run], float | None]:
    """The trials an arm needs, given the results there are, and the best rate, None while one is missing."""
    if len(base.rates) == 1:
        return {}, base.rates[0]
    trials = {rate: _trial(name, config, base, rate) for rate in base.rates}
    for _ in range(base.further):
        best, ends = best_rate(trials, base, store, close=0.0), sorted(trials)
        if best not in (ends[0], ends[-1]):
            break
        at, inner = (ends[0], ends[1]) if best == ends[0] else (ends[-1], ends[-2])
        beyond = float(f"{at * at / inner:.6g}")
        trials[beyond] = _trial(name, config, base, beyond)
    return trials, best_rate(trials, base, store)


def _trial(name: str, config: ConfigDict, base: Base, rate: float) -> Run:
    own = _at_rate(config, base, rate, TUNE_SEED)
    own.steps = max(1, config.steps // base.part)
    return Run(f"{name}, rate x{rate:g}", key_of(own), own)


def _train(name: str, config: ConfigDict, base: Base, rate: float, seed: int) -> Run:
    own = _at_rate(config, base, rate, seed)
    return Run(f"{name}, seed {seed}", key_of(own), own)


def _at_rate(config: ConfigDict, base: Base, rate: float, seed: int) -> ConfigDict:
    own = changed(config, {field: seed for field in ("seed", *base.reseeded)}, "base")
    own.optim.lr = float(f"{config.optim.lr * rate:.6g}")
    return own


def best_rate(trials: Mapping[float, Run], base: Base, store: Store, close: float = CLOSE) -> float | None:
    """The lowest multiple of those whose trials ended within `close` of the best; None while one is missing.

    Raises:
      TableError: every trial diverged.
    """
    found: dict[float, Result | None] = {rate: store.read(run.key) for rate, run in trials.items()}
    if any(result is None for result in found.values()):
        return None
    sign = 1 if base.lower else -1
    scored = {rate: sign * r.heldout[base.metric] for rate, r in found.items() if r and not r.failed}
    if not scored:
        first = next(iter(trials))
        raise TableError(
            f"{trials[first].label}: the run failed at every rate tried: {found[first] and found[first].failed}"
        )
    best = min(scored.values())
    return min(rate for rate, score in scored.items() if score <= best + close * abs(best))


def key_of(config: ConfigDict) -> str:
    """The content of a run: its config, structures in canonical text, and its data, which is not made where the config says
    all of it."""
    fields = {name: value for name, value in identity(config).items() if name != "structure"}
    return content_key(fields, {"": Rules.of(config.structure)}, data_hash(config))


def data_hash(config: ConfigDict) -> str:
    """SHA-256 of the data of a config's task, or the version of the code that makes it."""
    fields = config.data.to_dict() if "data" in config else {}
    return _data_hash(config.to_json(), json.dumps([config.task, fields, config.model.get("vocab", 0)], sort_keys=True))


_HASHES: dict[str, str] = {}


def _data_hash(config: str, data: str) -> str:
    if data not in _HASHES:
        parsed = ConfigDict(json.loads(config))
        task = TASKS[parsed.task].build(parsed)
        _HASHES[data] = task.generated or task.load().sha256
    return _HASHES[data]
