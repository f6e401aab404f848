"""Which structure for the weights of a trained model? Every candidate at equal budget, projected from each weight.

    python -m experiments.choose --workdir=runs/demo/arms/dense --match="layers_.*/mlp/.*" --budgets=0.1,0.25,0.5
    python -m experiments.choose --files=path/to/weights --transpose --structure="low_rank()" --structure="monarch()"

Reads one stored array at a time, from the newest intact checkpoint of a run or from .npy and .safetensors files. Writes
choose.json, table.md and plot.png under --out; table.md ends with rules that `--config.structure` takes. Interrupted, or
stopped by --minutes, it goes on where it was when run again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.analysis.choices import Choice, Choices
from structmat.analysis.choose import METRICS, candidates, choose
from structmat.analysis.pages import page_of
from structmat.analysis.weight_files import file_weights
from structmat.structures import parse
from structmat.training.errors import RunError
from structmat.training.load import stored_weights
from structmat.training.plain_json import plain
from structmat.training.record import Record

flags = OwnFlags()
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
MINUTES = flags.DEFINE_float("minutes", math.inf, "Stop after this time; run again to go on.", lower_bound=0.1)
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
    minutes: float = math.inf,
) -> Record:
    """Choose for every weight of `readers`, and write choose.json after every candidate, the report at the end.

    What choose.json already holds of this choice, on weights with the same bytes, is not done again; candidates may be
    added or left out.

    Args:
      source: what the Record's config says of where the weights come from.
      minutes: stop after this time; `Record.metrics["left"]` says how many projections are missing.
    """
    began, path = time.perf_counter(), out / "choose.json"
    tried = [parse(s).short() for s in structures] if structures else [c.short() for c in candidates()]
    budgets = sorted(set(budgets))
    config = plain({**source, "budgets": budgets, "metric": metric, "structures": tried}, "config")
    rows, hashes, spent = _known(path, config, seed)
    wanted = len(readers) * len(tried) * len(budgets)
    for number, (name, read) in enumerate(readers.items(), 1):
        done = {row.candidate for row in rows if row.path == name}
        for found in _projections(name, read, [c for c in tried if c not in done], config, seed, hashes, path):
            rows += found
            shown = "  ".join(f"{r.error:.4f}" if r.error is not None else "-" for r in found)
            print(f"[{number}/{len(readers)}] {name}  {shown}  {found[0].candidate}", flush=True)
            seconds = spent + time.perf_counter() - began
            _record(out.name, config, rows, hashes, seed, seconds, wanted).write(path)
            if time.perf_counter() - began > 60 * minutes:
                break
        else:
            continue
        break
    record = Record.read(path)
    write_report(choices_of(record), record, out)
    return record


def _projections(
    name: str,
    read: Callable[[], Any],
    pending: list[str],
    config: Mapping[str, Any],
    seed: int,
    hashes: dict[str, str],
    path: Path,
) -> Iterator[tuple[Choice, ...]]:
    """The Choices of one weight, candidate by candidate; it is read once, and only if there is something to do."""
    if not pending:
        return
    w = np.ascontiguousarray(read())
    digest = hashlib.sha256(f"{w.dtype} {w.shape}".encode())
    digest.update(w.view(np.uint8))
    if hashes.setdefault(name, digest.hexdigest()) != digest.hexdigest():
        raise RunError(f"{str(path)!r} was made from another weight {name!r}; give another --out")
    for candidate in pending:
        key = jax.random.key(seed)
        yield choose({name: w}, config["budgets"], metric=config["metric"], structures=[candidate], key=key).rows


def _known(path: Path, config: Mapping[str, Any], seed: int) -> tuple[list[Choice], dict[str, str], float]:
    """Rows, hashes of the weights and seconds of an earlier, perhaps unfinished, run of the same choice."""
    if not path.exists():
        return [], {}, 0.0
    old = Record.read(path)
    now, then = ({**c, "structures": None, "seed": n} for c, n in ((config, seed), (old.config, old.seed)))
    if changed := [k for k in sorted({*now, *then}) if now.get(k) != then.get(k)]:
        raise RunError(f"{str(path)!r} holds another choice (other {', '.join(changed)}); give another --out")
    rows = [row for row in choices_of(old).rows if row.candidate in config["structures"]]
    return rows, dict(old.metrics["weights"]), old.seconds


def _record(
    name: str,
    config: Mapping[str, Any],
    rows: list[Choice],
    hashes: Mapping[str, str],
    seed: int,
    seconds: float,
    wanted: int,
) -> Record:
    choices = Choices(tuple(rows), config["metric"], tuple(config["budgets"]))
    best = [choices.ranked(p, b)[0] for p in choices.paths for b in choices.budgets]
    return Record.create(
        name=name,
        kind="choose",
        config=config,
        structures={f"{row.path} at {row.budget:g}": row.structure for row in best if not row.reason},
        seed=seed,
        data_hash=hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        seconds=seconds,
        metrics={
            "rows": [dataclasses.asdict(row) for row in rows],
            "standings": [dataclasses.asdict(s) for b in choices.budgets for s in choices.standings(b)],
            "weights": hashes,
            "left": wanted - len(rows),
        },
    )


def choices_of(record: Record) -> Choices:
    """The Choices a Record of this command holds."""
    fields = {"rows": record.metrics["rows"], "metric": record.config["metric"], "budgets": record.config["budgets"]}
    return Choices.from_json(json.dumps(fields))


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
        console = page_of(file, 220)
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
    record = run(
        readers,
        budgets,
        out,
        source=source,
        metric=METRIC.value,
        structures=STRUCTURE.value,
        seed=SEED.value,
        minutes=MINUTES.value,
    )
    choices = choices_of(record)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(choices.overview(box.ROUNDED))
    console.print(best_table(choices, box.ROUNDED))
    if record.metrics["left"]:
        print(
            f"stopped after {MINUTES.value:g} minutes with {record.metrics['left']} projections to go; run again to go on"
        )
    print(f"written: {out / 'choose.json'}, {out / 'table.md'}, {out / 'plot.png'}")


if __name__ == "__main__":
    cli.run(main, flags)
