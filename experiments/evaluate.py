"""Held-out figures of a run's newest checkpoint, on its own data or on other data of the same kind.

    python -m experiments.evaluate --workdir=runs/gpt2
    python -m experiments.evaluate --workdir=runs/gpt2 --config.data.root=data/wikitext103/tokens --config.batch=4 \\
        --config.eval.batches=100 --out=runs/gpt2/wikitext103.json

Without `--config` it is the run's own, configs/stored.py; what the model is cannot be changed here. `--out` writes a
Record.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.parallel import make_mesh, on_mesh
from structmat.training.build import evaluate, make_eval_step
from structmat.training.config import FREE, differences, validate
from structmat.training.errors import ConfigError
from structmat.training.load import Run, load_run
from structmat.training.record import Record
from structmat.training.state import TrainState
from structmat.training.task import Task, dump_table, with_table

STORED = "configs/stored.py"
MAY_CHANGE = ("data.", "eval.", "batch", "model.dtype", "model.context", "model.remat", *FREE)
"""What may differ from the run's config, or begin so."""


class StoredFlags(OwnFlags):
    """Own flags; without `--config` the config is that of the run in `--workdir`."""

    def parse(self, parser: Callable[..., None]) -> None:
        """See OwnFlags."""
        super().parse(lambda: parser(with_stored(sys.argv)))


flags = StoredFlags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
OUT = flags.DEFINE_string("out", None, "File to write the Record to, such as figures.json.")


def with_stored(argv: list[str]) -> list[str]:
    """The arguments with `--config=configs/stored.py:RUN` before them, where they name a run and no config."""
    value = lambda name: next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith(f"{name}=")), None)
    if value("config") is not None or not value("workdir"):
        return argv
    return [argv[0], f"--config={STORED}:{value('workdir')}", *argv[1:]]


def evaluated(run: Run, config: ConfigDict, name: str) -> Record:
    """The Record of the run's model on the held-out data of `config`, on this process's first device.

    Raises:
      ConfigError: a field that would make it another model. DataError: missing or malformed data.
    """
    began = time.perf_counter()
    for field, was, now in differences(run.config.to_dict(), config.to_dict()):
        if not field.startswith(MAY_CHANGE):
            raise ConfigError(field, now, f"the run has {was!r}, and it is evaluated as it is", f"{was!r} is")
    if "context" in config.model and config.model.context > run.config.model.context:
        rule = f"the model has learned {run.config.model.context}"
        raise ConfigError("model.context", config.model.context, f"must be at most that of the run: {rule}")
    config = ConfigDict(config.to_dict())
    config.mesh = ConfigDict(dict(replica=1, data=1, fsdp=1, tensor=1))
    task = with_table(validate(config, 1), dump_table(run.task.table))
    source = task.load()
    mesh = make_mesh(config.mesh.to_dict(), jax.local_devices()[:1])
    variables = _shortened(run.variables, config)
    state = TrainState(
        jax.numpy.int32(run.step), **variables, opt_state={}, rule_state={}, skips=jax.numpy.zeros(2, jax.numpy.int32)
    )
    with on_mesh(mesh):
        figures = evaluate(make_eval_step(task, mesh), state, source, mesh)
    return Record.create(
        name=name,
        kind="evaluate",
        config=config.to_dict(),
        structures={path: site.bound.structure for path, site in task.table.items()},
        seed=config.seed,
        data_hash=source.sha256,
        seconds=time.perf_counter() - began,
        metrics={
            "metric": task.metric,
            "heldout": figures,
            "reference": dict(source.reference),
            "step": run.step,
            "params": task.params,
            **site_totals(task),
            "flops_per_unit": task.flops(),
            "unit": task.unit,
            "data": source.description,
        },
    )


def site_totals(task: Task) -> dict[str, int]:
    """Stored real numbers and bits of the structured weights, with f32 leaves, and of dense ones in their place."""
    bounds = [site.bound for site in task.table.values()]
    return {
        "site_params": sum(b.params for b in bounds),
        "dense_site_params": sum(b.dense_params for b in bounds),
        "site_bits": sum(b.cost(1).bits for b in bounds),
        "dense_site_bits": sum(32 * b.dense_params for b in bounds),
    }


def _shortened(variables: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """With the positions of a shorter context, where they are learned."""
    params = dict(variables["params"])
    if "positions" in params and "context" in config.get("model", {}):
        params["positions"] = params["positions"][: config.model.context]
    return {**variables, "params": params}


def figures_table(record: Record) -> Table:
    """The held-out figures and the size of the model."""
    held, table = (
        record.metrics,
        Table("figure", "value", box=box.ROUNDED, title=f"{record.name}, step {record.metrics['step']}"),
    )
    table.columns[1].justify = "right"
    for name in sorted(held["heldout"], key=lambda n: n != held["metric"]):
        table.add_row(f"held-out {name}", f"{held['heldout'][name]:.4f}")
    for name, value in held["reference"].items():
        table.add_row(f"{name} (no model)", f"{value:.4f}")
    table.add_section()
    share = lambda part, whole: f"{part:,} ({part / whole:.1%} of dense)"
    table.add_row("parameters", f"{held['params']:,}")
    table.add_row("of structured weights", share(held["site_params"], held["dense_site_params"]))
    table.add_row("their bits", share(held["site_bits"], held["dense_site_bits"]))
    table.add_row(f"FLOPs per {held['unit']}, forward", f"{held['flops_per_unit']:,}")
    return table


def main() -> None:
    """Evaluate the run of the flags."""
    if not WORKDIR.value:
        cli.fail("--workdir is needed, such as --workdir=runs/demo/arms/dense")
    run = load_run(WORKDIR.value)
    record = evaluated(run, cli.CONFIG.value, Path(WORKDIR.value).name)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(figures_table(record))
    print(f"data: {record.metrics['data']}")
    model = record.config["model"]
    if record.config["task"] == "lm" and not record.config["data"]["root"] and model["vocab"] != 256:
        print("note: these are bytes, not tokens of this vocabulary; give --config.data.root=TOKENS")
    if OUT.value:
        print(f"record: {record.write(OUT.value)}")


if __name__ == "__main__":
    cli.run(main, flags)
