"""Train several structures on the same task, steps and data, and show them side by side.

    python -m experiments.compare --config=configs/demo.py --workdir=runs/demo
    python -m experiments.compare --config=configs/digits.py --workdir=runs/mine \\
        --structure="fit(monarch(), params=0.3)" --structure="low_rank(rank=8)"

Besides the structures named there are two arms of dense weights: `dense`, and `dense small`, the widest dense model with
no more parameters than the largest structured arm. Every arm is checked before the first one starts; run again, finished
arms are read from their records and an interrupted one resumes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.equal import dense_small, with_model
from experiments.own_flags import OwnFlags
from experiments.step_times import step_times
from structmat.analysis.pages import page_of
from structmat.analysis.plots import tradeoff
from structmat.structures import Rules, parse
from structmat.training import workdir
from structmat.training.config import identity, validate
from structmat.training.errors import ConfigError, RunError
from structmat.training.loop import train
from structmat.training.progress import Runs
from structmat.training.record import Record, same_data
from structmat.training.task import Task

flags = OwnFlags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison: arms/, compare.json, table.md, plot.png.")
STRUCTURES = flags.DEFINE_multi_string(
    "structure", [], "A structure or rules to compare; repeat. Default: the config's."
)
SMALL = "dense small"
TIMED_STEPS = 25


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run of a comparison: a label, its config, and the task with structures resolved."""

    label: str
    config: ConfigDict
    task: Task

    @property
    def folder(self) -> str:
        """Name of its folder: the label in letters, digits and underscores."""
        return re.sub(r"[^a-zA-Z0-9.]+", "_", self.label).strip("_")

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return self.task.params


def make_arms(config: ConfigDict, structures: list[str]) -> list[Arm]:
    """Check every arm: dense first, dense small second, both without a method or a switch, then the structures as given.

    Raises:
      ConfigError: no structure is given, or one arm is not valid.
    """
    config = config.copy_and_resolve_references()
    spec = config.get("compare", ConfigDict())
    if "compare" in config:
        with config.unlocked():
            del config.compare
    structures = list(structures or spec.get("structures", ()))
    if not structures:
        raise ConfigError("compare.structures", (), "nothing to compare", "--structure='fit(monarch(), params=0.3)' is")
    plain = ConfigDict(config.to_dict() | {"method": "", "switch": ""})
    arms = [_arm("dense", plain, structure="dense()")]
    for text in dict.fromkeys(str(Rules.of(text)) for text in structures):
        if text != str(Rules.of("dense()")):
            arms.append(_arm(text if "->" in text else parse(text).short(), config, structure=text))
    small = _small(plain, max(arm.params for arm in arms[1:]), arms[0].params) if len(arms) > 1 else None
    arms = arms[:1] + ([small] if small else []) + arms[1:]
    folders = [arm.folder for arm in arms]
    if twice := [arm.label for arm in arms if folders.count(arm.folder) > 1]:
        raise ConfigError("compare.structures", twice, "these would share a folder", "one of them is enough")
    return arms


def _arm(label: str, config: ConfigDict, structure: str) -> Arm:
    own = with_model(config, structure)
    return Arm(label, own, validate(own))


def _small(config: ConfigDict, params: int, dense: int) -> Arm | None:
    """The widest dense model with at most `params` parameters; None if the structures save nothing, or almost all."""
    own = dense_small(config, params) if params < dense else None
    return Arm(SMALL, own, validate(own)) if own else None


def row_of(arm: Arm, record: Record, dense: Record, seconds: float, dense_seconds: float) -> dict[str, Any]:
    """One row of the table, all figures from the records, the resolved structures and the steps timed in turn."""
    sites = [s for s in arm.task.table.values() if s.bound.structure.name != "dense"]
    dense_size, size = (sum(f(s) for s in sites) for f in (lambda s: s.bound.dense_params, lambda s: s.bound.params))
    metrics, base = record.metrics, dense.metrics
    texts = list(dict.fromkeys(s.bound.structure.short() for s in sites))
    return {
        "label": arm.label,
        "structures": texts or ["dense()"],
        "params": arm.params,
        "site_share": size / dense_size if sites else None,
        "model_share": arm.params / base["params"] if arm.label != "dense" else 1.0,
        "flops_per_unit": metrics["flops_per_unit"],
        "path": arm.task.path,
        "step_ms": 1e3 * seconds,
        "relative_step_time": seconds / dense_seconds,
        "metric": metrics["heldout"][metrics["metric"]],
        "heldout": metrics["heldout"],
        "seconds": record.seconds,
    }


def table_of(rows: list[dict[str, Any]], dense: Record, markdown: bool) -> Table:
    """The comparison as a rich table."""
    unit, metric = dense.metrics["unit"], dense.metrics["metric"].replace("_", " ")
    names = [
        "structure",
        "parameters",
        "sites kept",
        "model kept",
        f"FLOPs/{unit}",
        "path",
        "step time",
        f"held-out {metric}",
    ]
    table = Table(box=box.MARKDOWN if markdown else box.ROUNDED, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    show = lambda value, spec: format(value, spec) if value is not None else "-"
    for r in rows:
        table.add_row(
            r["label"],
            f"{r['params']:,}",
            show(r["site_share"], ".1%"),
            show(r["model_share"], ".1%"),
            f"{r['flops_per_unit']:,}",
            r["path"],
            show(r["relative_step_time"], ".2f") + "x",
            f"{r['metric']:.4f}",
        )
    for name, value in dense.metrics["reference"].items():
        table.add_row(name.replace("_", " "), *["-"] * (len(names) - 2), f"{value:.4f}")
    return table


def compare(config: ConfigDict, folder: Path, structures: list[str]) -> Record:
    """Run what is missing and write compare.json, table.md and plot.png into `folder`.

    Raises:
      ConfigError, RunError, DataError: what is wrong, before the first arm starts wherever it can be known.
    """
    began = time.perf_counter()
    arms = make_arms(config, structures)
    for arm in arms:
        workdir.claim(folder / "arms" / arm.folder, identity(arm.config))
    runs, records = Runs(len(arms)), []
    for arm in arms:
        place = folder / "arms" / arm.folder
        started, done = time.perf_counter(), (place / workdir.RECORD).exists()
        runs.skip() if done else runs.begin()
        records.append(
            Record.read(place / workdir.RECORD) if done else train(arm.config, place, name=arm.label, runs=runs)
        )
        if not done:
            runs.finish(time.perf_counter() - started)
    data = same_data(records)
    seconds = _known_seconds(folder, records) or [
        statistics.median(times) for times in step_times([(arm.config, arm.task) for arm in arms], TIMED_STEPS)
    ]
    rows = [row_of(arm, r, records[0], s, seconds[0]) for arm, r, s in zip(arms, records, seconds)]
    record = Record.create(
        name=folder.name,
        kind="compare",
        config=json.loads(arms[0].config.to_json()),
        structures={arm.label: arm.config.structure for arm in arms},
        seed=config.seed,
        data_hash=data,
        seconds=time.perf_counter() - began,
        metrics={
            "rows": rows,
            "runs": [r.date for r in records],
            "reference": records[0].metrics["reference"],
            "data": records[0].metrics["data"],
        },
    )
    record.write(folder / "compare.json")
    write_report(folder, rows, records[0], record)
    return record


def _known_seconds(folder: Path, records: list[Record]) -> list[float] | None:
    """Step times of an earlier report on these very runs."""
    path = folder / "compare.json"
    if path.exists() and (old := Record.read(path)).metrics["runs"] == [r.date for r in records]:
        return [row["step_ms"] / 1e3 for row in old.metrics["rows"]]
    return None


def write_report(folder: Path, rows: list[dict[str, Any]], dense: Record, record: Record) -> None:
    """table.md with the conditions of the measurement, and plot.png."""
    metric, unit = dense.metrics["metric"].replace("_", " "), dense.metrics["unit"]
    with (folder / "table.md").open("w") as file:
        console = page_of(file, 200)
        console.print(table_of(rows, dense, markdown=True))
        console.print(
            f"\n{dense.metrics['steps']} steps of {dense.metrics['units_per_step']} {unit}s each, seed {record.seed}, one run "
            f"per arm; {dense.metrics['data']}. Step time is relative to dense, timed in turn after training "
            f"({record.device['cpu']}, {record.device['cores']} cores, jax {record.versions['jax']}, {record.date}). "
            f"Command: `{record.command}`",
            soft_wrap=True,
            markup=False,
        )
    references = list(dense.metrics["reference"].items())
    tradeoff(
        rows,
        [("flops_per_unit", f"FLOPs per {unit}, forward"), ("params", "parameters")],
        ("metric", f"held-out {metric}"),
        folder / "plot.png",
        (references[0][0].replace("_", " "), references[0][1]) if references else None,
    )


def main() -> None:
    """Run the comparison of the flags and print its table."""
    if cli.CONFIG.value is None:
        cli.fail("--config is needed, such as --config=configs/demo.py")
    if not WORKDIR.value:
        cli.fail("--workdir is needed, such as --workdir=runs/demo")
    folder = Path(WORKDIR.value)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"workdir {str(folder)!r} is a file; give a new folder")
    record = compare(cli.CONFIG.value, folder, STRUCTURES.value)
    dense = Record.read(folder / "arms" / "dense" / workdir.RECORD)
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(record.metrics["rows"], dense, markdown=False))
    print(f"written: {folder / 'compare.json'}, {folder / 'table.md'}, {folder / 'plot.png'}")


if __name__ == "__main__":
    cli.run(main, flags)
