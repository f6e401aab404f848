"""Steps of a table's arms timed in turn on a quiet machine: times from runs hours apart cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from experiments.step_times import step_times
from experiments.tables.plan import arms_of, key_of
from experiments.tables.schema import DENSE, Table
from experiments.tables.store import Store
from structmat.analysis.timing import median_ratio
from structmat.training.config import validate
from structmat.training.record import Record

SECONDS = 30.0
"""Of one table's steps, about; compiling comes on top."""
FEWEST, MOST = 15, 200
"""Steps of each arm."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Arm -> the time of its step over that of dense's, as the median over pairs, and the Record of all."""

    over_dense: Mapping[str, float]
    record: Record


def time_table(table: Table, scale: str, store: Store) -> Record:
    """Time every arm's step beside dense's, and keep the Record.

    Raises:
      TableError, ConfigError: as `arms_of`.
    """
    began = time.perf_counter()
    arms = [(arm, config) for arm, config in arms_of(table, scale) if not arm.reference]
    runs = [(config, validate(config)) for _, config in arms]
    trial = sum(min(times) for times in step_times(runs[:1], 3)) * len(runs)
    repeats = max(FEWEST, min(MOST, int(SECONDS / trial)))
    times = {arm.name: found for (arm, _), found in zip(arms, step_times(runs, repeats))}
    rows = {
        arm.name: {
            "key": key_of(config),
            "seconds": statistics.median(times[arm.name]),
            "over_dense": median_ratio(times[arm.name], times[DENSE]),
        }
        for arm, config in arms
    }
    record = Record.create(
        name=f"{table.name}_{scale}_times",
        kind="tables",
        config=json.loads(arms[0][1].to_json()),
        structures={},
        seed=arms[0][1].seed,
        data_hash="",
        seconds=time.perf_counter() - began,
        metrics={"rows": rows, "repeats": repeats},
    )
    record.write(place_of(table, store))
    return record


def place_of(table: Table, store: Store) -> Path:
    """The file of a table's times."""
    return store.folder / store.scale / "times" / f"{table.name}.json"


def known_times(table: Table, scale: str, store: Store) -> Times | None:
    """What `time_table` has kept, of the arms that have not changed since."""
    place = place_of(table, store)
    if not place.exists():
        return None
    record = Record.read(place)
    rows, now = record.metrics["rows"], {arm.name: key_of(config) for arm, config in arms_of(table, scale)}
    if rows[DENSE]["key"] != now[DENSE]:
        return None
    found = {name: rows[name]["over_dense"] for name, key in now.items() if name in rows and rows[name]["key"] == key}
    return Times(found, record)
