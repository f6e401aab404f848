"""Which structure for the weights of a trained model? Every candidate at equal budget, projected from each weight.

    python -m experiments.choose --workdir=runs/demo/arms/dense --match="layers_.*/mlp/.*" --budgets=0.1,0.25,0.5
    python -m experiments.choose --files=path/to/weights --transpose --structure="low_rank()" --structure="monarch()"

Reads one stored array at a time, from the newest intact checkpoint of a run or from .npy and .safetensors files. Writes
choose.json, table.md and plot.png under --out; table.md ends with rules that `--config.structure` takes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from structmat.analysis.choices import Choice, Choices
from structmat.analysis.choose import METRICS, candidates, choose
from structmat.analysis.weight_files import file_weights
from structmat.structures import parse
from structmat.training.load import stored_weights
from structmat.training.record import Record

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run; its newest intact checkpoint is read.")
FILES = flags.DEFINE_string("files", None, "Instead: a folder of .npy and .safetensors files, or one of them.")
MATCH = flags.DEFINE_string(
    "match", None, "Regex the whole path must match; default linear weights, or all of --files."
)
TRANSPOSE = flags.DEFINE_bool("transpose", False, "The files hold (d_out, d_in), as PyTorch stores linear layers.")
BUDGETS = flags.DEFINE_list("budgets", ["0.1", "0.25", "0.5"], "Fractions of the dense matrix.")
METRIC = flags.DEFINE_enum("metric", "bits", METRICS, "What is budgeted.")
STRUCTURE = flags.DEFINE_multi_string("structure", [], "A candidate; give several. Default: all families, some sums.")
SEED = flags.DEFINE_integer("seed", 0, "Of random parts of projections.", lower_bound=0)
OUT = flags.DEFINE_string("out", "runs/choose", "Folder to write to.")

Readers = Mapping[str, Callable[[], Any]]


def run(
    readers: Readers,
    budgets: list[float],
    out: Path,
    *,
    source: Mapping[str, Any],
    metric: str = "bits",
    structures: list[str] | None = None,
    seed: int = 0,
) -> tuple[Choices, Record]:
    """Choose for every weight of `readers`, read once each, and write choose.json, table.md and plot.png into `out`.

    Args:
      source: what the Record's config says of where the weights come from.
    """
    began, digest = time.perf_counter(), hashlib.sha256()
    tried = [parse(s).short() for s in structures] if structures else [c.short() for c in candidates()]
    choices = choose(
        {path: functools.partial(_hashed, path, read, digest) for path, read in readers.items()},
        budgets,
        metric=metric,
        structures=tried,
        key=jax.random.key(seed),
        progress=_Printer(len(readers), len(tried) * len(set(budgets))),
    )
    fitting = [(p, b) for p in choices.paths for b in choices.budgets if not choices.ranked(p, b)[0].reason]
    record = Record.create(
        name=out.name,
        kind="choose",
        config={**source, "budgets": list(choices.budgets), "metric": metric, "structures": tried},
        structures={f"{p} at {b:g}": choices.best(p, b).structure for p, b in fitting},
        seed=seed,
        data_hash=digest.hexdigest(),
        seconds=time.perf_counter() - began,
        metrics={
            "rows": [dataclasses.asdict(row) for row in choices.rows],
            "standings": [dataclasses.asdict(s) for b in choices.budgets for s in choices.standings(b)],
        },
    )
    record.write(out / "choose.json")
    write_report(choices, record, out)
    return choices, record


def _hashed(path: str, read: Callable[[], Any], digest: Any) -> np.ndarray:
    w = np.ascontiguousarray(read())
    digest.update(f"{path} {w.dtype} {w.shape}".encode())
    digest.update(w.view(np.uint8))
    return w


class _Printer:
    """One line per weight when its last projection is done: the best structure at each budget."""

    def __init__(self, weights: int, rows: int):
        self._weights, self._rows, self._done, self._own = weights, rows, 0, []

    def __call__(self, choice: Choice) -> None:
        self._own.append(choice)
        if len(self._own) < self._rows:
            return
        self._done += 1
        best: dict[float, Choice] = {}
        for row in self._own:
            if not row.reason and (row.budget not in best or row.error < best[row.budget].error):
                best[row.budget] = row
        shown = "; ".join(f"{b:g}: {r.short} {r.error:.4f}" for b, r in sorted(best.items())) or "nothing fits"
        print(f"[{self._done}/{self._weights}] {choice.path} {choice.shape}  {shown}", flush=True)
        self._own = []


def best_table(choices: Choices, style: box.Box) -> Table:
    """The best structure of every weight at every budget."""
    table = Table("weight", "shape", "budget", "best structure", "error", choices.metric, box=style)
    for path in choices.paths:
        for budget in choices.budgets:
            row = choices.ranked(path, budget)[0]
            shape = "x".join(map(str, row.shape))
            cells = ("none fits", "-", "-")
            if not row.reason:
                cells = (row.short, f"{row.error:.4f}", f"{getattr(row, choices.metric):.1%}")
            table.add_row(path, shape, f"{budget:g}", *cells)
    return table


def write_report(choices: Choices, record: Record, out: Path) -> None:
    """table.md with all tables, refusals and rules, and plot.png."""
    with (out / "table.md").open("w") as file:
        console = Console(file=file, width=220)
        line = functools.partial(console.print, soft_wrap=True, markup=False)
        device, versions = record.device, record.versions
        line(
            f"# Relative error at equal {choices.metric}: {len(choices.paths)} weights\n\n"
            f"Geometric mean over the weights (in brackets: on how many it is the best). {device['cpu']}, "
            f"{device['cores']} cores, {device['platform']}, jax {versions['jax']}, {record.date}, "
            f"{record.seconds:.0f} s, `{record.command}`. Budgets are fractions of the dense matrix's "
            f"{choices.metric}, a float counted as 32 bits and an index as 32.\n"
        )
        console.print(choices.overview(box.MARKDOWN))
        line("\n## The best of each weight\n")
        console.print(best_table(choices, box.MARKDOWN))
        for budget in choices.budgets if len(choices.paths) > 1 else ():
            line(f"\n## All at {choices.metric} {budget:g}\n")
            console.print(choices.table(budget=budget, box=box.MARKDOWN))
        line("\nSeconds are of all projections together, compilation included.\n\n## What does not fit\n")
        for refusal in choices.refusals() or ["everything fits"]:
            line(f"- {refusal}")
        line("\n## Rules\n\nFor `--config.structure`, each weight's best:\n")
        for budget in choices.budgets:
            if any(not choices.ranked(p, budget)[0].reason for p in choices.paths):
                line(f"- {choices.metric} {budget:g}: `{choices.rules(budget)}`")
    if any(row.error is not None for row in choices.rows):
        choices.plot().savefig(out / "plot.png", dpi=90)


def _budgets() -> list[float]:
    try:
        return [float(text) for text in BUDGETS.value]
    except ValueError:
        cli.fail(f"--budgets={','.join(BUDGETS.value)}: fractions separated by commas, such as 0.1,0.25,0.5")


def main() -> None:
    """Choose for the weights of the flags; print the tables."""
    if (WORKDIR.value is None) == (FILES.value is None):
        cli.fail("give either --workdir of a run, such as --workdir=runs/demo/arms/dense, or --files")
    budgets, out = _budgets(), Path(OUT.value)
    if out.exists() and not out.is_dir():
        cli.fail(f"--out={OUT.value} is a file; give a folder")
    if WORKDIR.value is not None:
        if TRANSPOSE.value:
            cli.fail("--transpose is for --files; weights of a run are (d_in, d_out)")
        weights = stored_weights(WORKDIR.value, MATCH.value)
        readers, source = weights.readers, {"workdir": WORKDIR.value, "step": weights.step, "match": MATCH.value}
    else:
        found = file_weights(FILES.value, MATCH.value, TRANSPOSE.value)
        for text in found.left_out:
            print(f"left out: {text}")
        source = {"files": FILES.value, "match": MATCH.value, "transpose": TRANSPOSE.value}
        source["left_out"] = list(found.left_out)
        readers = found.readers
    choices, _ = run(
        readers,
        budgets,
        out,
        source=source,
        metric=METRIC.value,
        structures=STRUCTURE.value,
        seed=SEED.value,
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(choices.overview(box.ROUNDED))
    console.print(best_table(choices, box.ROUNDED))
    print(f"written: {out / 'choose.json'}, {out / 'table.md'}, {out / 'plot.png'}")


if __name__ == "__main__":
    cli.run(main)
