"""Trained operators on forced flow, beyond the error they were trained for: other grids, longer times, which scales.

    python -m experiments.flow --runs=runs/fno,runs/tfno,runs/monarch --out=results/flow

Each run is one of the task navier_stokes, all on the same data. The operator that leads from `data.start` to `data.time`
leads as far again from there, since the forcing is steady: applied again to its own output it is compared with the solver
`--later` times that far. Writes a Record, a table and pictures of fields, spectra and errors in time.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.analysis.field_pictures import error_in_time, field_spectra, predicted_fields
from structmat.analysis.fields import error_growth, relative_h1, relative_l2
from structmat.analysis.pages import page_of
from structmat.training.errors import RunError
from structmat.training.load import Run, load_run
from structmat.training.record import Record
from structmat.training.tasks.navier_stokes import scales, solutions, trajectories
from structmat.training.tasks.operator_models import MODELS

flags = OwnFlags()
RUNS = flags.DEFINE_list("runs", [], "Folders of runs; the last part of each is its name.")
LATER = flags.DEFINE_integer("later", 3, "How many times the way from data.start to data.time to go.", lower_bound=2)
SHOWN = flags.DEFINE_integer("shown", 2, "Held-out samples in the pictures of fields.", lower_bound=1)
OUT = flags.DEFINE_string("out", "results/flow", "Folder to write to.")

SAME = ("seed", "resolution", "viscosity", "start", "time", "dt", "train", "test", "solve_resolution")
"""Fields of `config.data` that runs must share."""


def runs_of(folders: list[str]) -> dict[str, Run]:
    """name -> run.

    Raises:
      RunError: none, one of another task, two of a name, or of other data.
    """
    if not folders:
        raise RunError("--runs is empty: name folders of runs, such as --runs=runs/fno,runs/tfno")
    found: dict[str, Run] = {}
    for folder in folders:
        name = Path(folder).name
        if name in found:
            raise RunError(f"--runs: two runs are called {name!r}; give them folders of other names")
        run = found[name] = load_run(folder)
        if run.task.name != "navier_stokes":
            raise RunError(f"{folder!r} is a run of the task {run.task.name}; this command is for navier_stokes")
        first = next(iter(found.values()))
        for field in SAME:
            if (one := run.config.data[field]) != (other := first.config.data[field]):
                raise RunError(
                    f"{folder!r} has data.{field}={one}, and {next(iter(found))!r} {other}: not the same data"
                )
    return found


def operator(run: Run, scale: list[np.float64]) -> Callable[[np.ndarray], np.ndarray]:
    """Vorticity (samples, n, n) -> the run's prediction of it from `data.start` to `data.time`."""
    one = jax.jit(lambda x: run.task.model.apply(run.variables, x[None, ..., None])[0, ..., 0])

    def apply(fields: np.ndarray) -> np.ndarray:
        scaled = (fields * scale[0]).astype(np.float32)
        return np.stack([np.asarray(one(jnp.asarray(field))) for field in scaled]) / scale[1]

    return apply


def measure(name: str, run: Run, later: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of one run over its held-out samples, and the arrays of its pictures.

    Returns:
      A row: parameters, errors on the trained grid in L2 and H1, in L2 on twice the grid (None where the model is bound to
      its own), mean L2 error after each multiple of the way that was trained, and the rate d log(error) / d time of those; and `truth`
      and `predicted` (test, later, n, n) with `errors` (test, later) and `times` (later,).
    """
    d = run.config.data
    solved = solutions(d)
    own = solved.at(d.resolution)
    apply = operator(run, scales(own, d.test))
    ahead, fields, found = trajectories(d, d.test, d.resolution, later), own.inputs[: d.test], []
    for _ in range(later):
        fields = apply(fields)
        found.append(fields)
    predicted = np.stack(found, 1).astype(np.float32)
    growth = error_growth(jnp.asarray(predicted), jnp.asarray(ahead.outputs), ahead.times)
    target = jnp.asarray(own.outputs[: d.test, 0])
    mean = lambda error: float(jnp.mean(error))
    finer = None
    if MODELS[run.config.model.name].any_grid and solved.resolution > d.resolution:
        fine = apply(solved.inputs[: d.test])
        finer = mean(relative_l2(jnp.asarray(fine, jnp.float32), jnp.asarray(solved.outputs[: d.test, 0])))
    errors = np.asarray(growth.errors)
    row = {
        "run": name,
        "params": run.task.params,
        "structures": str(run.config.structure),
        "l2": mean(relative_l2(jnp.asarray(predicted[:, 0]), target)),
        "h1": mean(relative_h1(jnp.asarray(predicted[:, 0]), target)),
        "l2_fine": finer,
        "later": [float(e) for e in errors.mean(0)],
        "rate": mean(growth.rate),
    }
    return row, {"truth": ahead.outputs, "predicted": predicted, "errors": errors, "times": ahead.times}


def table(rows: list[dict[str, Any]], data: dict[str, Any], style: box.Box) -> Table:
    """One line per run."""
    later, fine = len(rows[0]["later"]), max(data["fine"], data["resolution"])
    way = data["time"] - data["start"]
    times = [f"L2 at t = {data['start'] + way * k:g}" for k in range(2, later + 1)]
    made = Table(
        "run", "parameters", "L2", "H1", f"L2 at {fine} x {fine}", *times, "growth per unit of time", box=style
    )
    for column in made.columns[1:]:
        column.justify = "right"
    for r in rows:
        fine = "-" if r["l2_fine"] is None else f"{r['l2_fine']:.4f}"
        rest = [f"{e:.4f}" for e in r["later"][1:]]
        made.add_row(r["run"], f"{r['params']:,}", f"{r['l2']:.4f}", f"{r['h1']:.4f}", fine, *rest, f"{r['rate']:+.3f}")
    return made


def report(record: Record, out: Path) -> None:
    """table.md beside the Record, and the table on the screen."""
    rows, data = record.metrics["rows"], record.config["data"]
    print_to = Console(width=None if sys.stdout.isatty() else 160)
    print_to.print(table(rows, data, box.ROUNDED))
    n, device = data["resolution"], record.device
    with (out / "table.md").open("w") as file:
        page = page_of(file, 200)
        line = lambda text: page.print(text, soft_wrap=True, markup=False, highlight=False)
        line("# Operators on forced flow: other grids, longer times\n")
        line(
            f"{record.metrics['data']}; trained on {data['train']} samples at {n} x {n}, here on the {data['test']} held out; "
            f"one seed. L2 and H1: mean relative errors at t = {data['time']:g}, which was trained. Later errors: the operator "
            f"applied to its own output. {device['cpu']}, {device['cores']} cores, {device['platform']}, jax "
            f"{record.versions['jax']}, {record.date}, `{record.command}`.\n"
        )
        page.print(table(rows, data, box.MARKDOWN))
        line("")
        for name in ("spectra", "growth", *(f"fields_{r['run']}" for r in rows)):
            line(f"![{name.replace('_', ' ')}]({name}.png)")


def main() -> None:
    """Measure, draw, write, print."""
    began, out = time.perf_counter(), Path(OUT.value)
    runs = runs_of(RUNS.value)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: measure(name, run, LATER.value) for name, run in runs.items()}
    data = next(iter(runs.values())).config.data
    shown = min(SHOWN.value, data.test)
    truth = next(iter(found.values()))[1]["truth"]
    spectra = {"solver": truth[:, 0]} | {name: arrays["predicted"][:, 0] for name, (_, arrays) in found.items()}
    field_spectra(spectra).savefig(out / "spectra.png", dpi=80)
    times = next(iter(found.values()))[1]["times"]
    errors = {name: arrays["errors"] for name, (_, arrays) in found.items()}
    error_in_time(times, errors).savefig(out / "growth.png", dpi=80)
    for name, (_, arrays) in found.items():
        picture = predicted_fields(arrays["truth"][:shown, 0], arrays["predicted"][:shown, 0])
        picture.savefig(out / f"fields_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}.png", dpi=60)
    record = Record.create(
        name="flow",
        kind="evaluate",
        config={"data": data.to_dict(), "runs": list(runs), "later": LATER.value},
        structures={name: run.config.structure for name, run in runs.items()},
        seed=next(iter(runs.values())).config.seed,
        data_hash=next(iter(runs.values())).task.load().sha256,
        seconds=time.perf_counter() - began,
        metrics={"rows": [row for row, _ in found.values()], "data": solutions(data).description},
    )
    record.write(out / "flow.json")
    report(record, out)
    print(f"written: {out}")


if __name__ == "__main__":
    cli.run(main, flags)
