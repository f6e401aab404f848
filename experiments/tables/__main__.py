"""Tables of papers, our numbers beside theirs.

    python -m experiments.tables list
    python -m experiments.tables run NAME|all --scale=cpu [--budget=60m]
    python -m experiments.tables run NAME|all --scale=gpu --sweep=commands      # one command per missing run
    python -m experiments.tables time NAME|all [--scale=cpu] [--budget=20m]      # steps of all arms in turn; on a quiet machine
    python -m experiments.tables show NAME [--scale=cpu]
    python -m experiments.tables check NAME|all --scale=paper [--budget=60m]     # compile for a pod; needs libtpu
    python -m experiments.tables report                                          # the page of all tables, and README's summary

Runs are known by their content and shared between tables; a command that was stopped goes on where it was.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from experiments import cli
from experiments.own_flags import OwnFlags
from experiments.tables import check as checking
from experiments.tables.plan import Run, plan
from experiments.tables.registry import TABLES, table_of
from experiments.tables.report import report, with_results
from experiments.tables.results import results_of
from experiments.tables.runner import execute, missing, run_table, share_programs
from experiments.tables.schema import SCALES, Table, TableError
from experiments.tables.show import caption, grid, verdicts
from experiments.tables.store import Store
from experiments.tables.summary import within
from experiments.tables.timing import place_of, time_table
from structmat.analysis.pages import page_of
from structmat.structures.errors import suggest
from structmat.training.record import Record, RecordError

COMMANDS = ("list", "run", "time", "show", "check", "report")
SWEEPS = ("print", "commands")
flags = OwnFlags()
SCALE = flags.DEFINE_enum("scale", "cpu", SCALES, "which size of task")
BUDGET = flags.DEFINE_string("budget", "", "time to stop after, such as 45s, 60m or 3h; '' is none")
SWEEP = flags.DEFINE_enum("sweep", None, SWEEPS, "print the missing runs, or one command for each, and run none")
ONLY = flags.DEFINE_string("only", "", "the one run to train, by the key --sweep prints")
RESULTS, README = Path("results/tables"), Path("README.md")
OUT = flags.DEFINE_string("out", str(RESULTS), "folder of results and report")
RUNS = flags.DEFINE_string("runs", "runs/tables", "folder of runs under way")
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(budget: str) -> float:
    """`60m` as seconds; '' is no limit.

    Raises:
      TableError: no such time.
    """
    if not budget:
        return float("inf")
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)):
        raise TableError(f"--budget={budget}: not a time; 45s, 60m and 3h are")
    return float(match[1]) * _UNITS[match[2]]


def show_list(folder: Path, console: Console) -> None:
    """Every table, what has been run of it, and what became of its claims."""
    lines = Grid("table", "scale", "arms", "runs", "claims that hold / do not / undecided", "title", box=box.ROUNDED)
    for table in TABLES.values():
        for scale in table.bases:
            store = Store(folder, scale)
            if store.empty():
                lines.add_row(table.name, scale, str(len(table.arms)), "none yet", "", table.title)
                continue
            made = plan(table, scale, store)
            runs = made.runs()
            done = sum(store.read(run.key) is not None for run in runs)
            status = [v.status if v else "not decided" for _, v in verdicts(results_of(made, store))]
            counts = " / ".join(str(status.count(s)) for s in ("holds", "does not hold", "not decided"))
            whole = "" if made.complete() else "+"
            lines.add_row(table.name, scale, str(len(made.rows)), f"{done}/{len(runs)}{whole}", counts, table.title)
    console.print(lines)


def sweep(tables: Sequence[Table], how: str) -> None:
    """Print the missing runs: with their number and label, or as commands."""
    found: dict[str, tuple[Table, Run]] = {}
    for table in tables:
        for run in missing(table, SCALE.value, Store(Path(OUT.value), SCALE.value)):
            found.setdefault(run.key, (table, run))
    for number, (table, run) in enumerate(found.values()):
        command = f"python -m experiments.tables run {table.name} --scale={SCALE.value} --only={run.key}"
        print(command if how == "commands" else f"{number} {run.key} {table.name}: {run.label}")


def run(tables: Sequence[Table]) -> None:
    """Train what is missing, then show the tables."""
    store, folder, budget = Store(Path(OUT.value), SCALE.value), Path(RUNS.value), seconds_of(BUDGET.value)
    share_programs(folder)
    if ONLY.value:
        todo = [r for table in tables for r in missing(table, SCALE.value, store) if r.key == ONLY.value]
        if not todo and store.read(ONLY.value) is None:
            raise TableError(f"--only={ONLY.value}: no such run is missing; --sweep=print lists them")
        if todo and not execute(todo[0], store, folder, budget):
            print("stopped when the time was up; run again to go on")
        return
    until = time.monotonic() + budget
    for table in tables:
        if not run_table(table, SCALE.value, store, folder, until - time.monotonic()):
            break


def time_all(tables: Sequence[Table]) -> None:
    """Time the steps of every table's arms, those never timed first, until the time is up."""
    store, until = Store(Path(OUT.value), SCALE.value), time.monotonic() + seconds_of(BUDGET.value)
    for i, table in enumerate(sorted(tables, key=lambda table: place_of(table, store).exists())):
        if time.monotonic() > until:
            print(f"stopped when the time was up, with {len(tables) - i} tables to go")
            return
        times = time_table(table, SCALE.value, store).metrics["rows"]
        print(
            f"{table.name}: " + ", ".join(f"{name} {row['over_dense']:.2f}x" for name, row in times.items()), flush=True
        )


def check_all(tables: Sequence[Table], console: Console) -> None:
    """Compile the arms for their pods, and write what came of it; ends with code 1 where one does not fit."""
    out = Path(OUT.value) / SCALE.value / "check.json"
    rows = checking.check(tables, SCALE.value, out, seconds_of(BUDGET.value) / 60)
    if not rows:
        return
    head, table, tail = checking.page(rows, Record.read(out))
    with out.with_suffix(".md").open("w") as file:
        written = page_of(file, 300)
        for part in (head, table, "\n" + tail):
            written.print(part, soft_wrap=True, markup=False)
    console.print(checking.grid(rows, box.ROUNDED))
    console.print(f"{tail} written: {out}, {out.with_suffix('.md')}")
    if not all(r["fits"] for r in rows):
        sys.exit("some arms do not fit")


def write_report(folder: Path) -> None:
    """The page of all tables; of the committed results also their summary in README."""
    print(f"written: {report(list(TABLES.values()), folder)}")
    if folder == RESULTS and README.exists():
        README.write_text(within(README.read_text(), with_results(list(TABLES.values()), folder)))
        print(f"written: {README}")


def show(table: Table, console: Console) -> None:
    """Print a table."""
    store = Store(Path(OUT.value), SCALE.value)
    results = results_of(plan(table, SCALE.value, store), store)
    console.print(f"{table.title}\n{table.citation}")
    console.print(grid(results, box.ROUNDED))
    for paragraph in caption(results):
        console.print(paragraph.replace("**", ""), soft_wrap=True, markup=False)
    if table.extra:
        console.print(table.extra(results), soft_wrap=True, markup=False)


def main(argv: Sequence[str]) -> None:
    """Do what the command says."""
    console = Console(width=None if sys.stdout.isatty() else 250)
    try:
        command, names = _parsed(argv)
        if command == "list":
            show_list(Path(OUT.value), console)
        elif command == "report":
            write_report(Path(OUT.value))
        elif command == "check":
            check_all(_at_scale(names), console)
        elif command == "time":
            time_all(_at_scale(names))
        elif SWEEP.value:
            sweep(_at_scale(names), SWEEP.value)
        elif command == "run":
            run(_at_scale(names))
            if not ONLY.value:
                for table in _at_scale(names):
                    show(table, console)
        else:
            for table in _at_scale(names):
                show(table, console)
    except (TableError, RecordError, *cli.USER_ERRORS) as error:
        cli.fail(error)


def _parsed(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(command, names of tables)."""
    words = list(argv[1:])
    if not words:
        raise app.UsageError(f"give a command: {', '.join(COMMANDS)}")
    command, *names = words
    if command not in COMMANDS:
        raise app.UsageError(f"no command {command!r}" + suggest(command, COMMANDS))
    if command in ("list", "report") and names:
        raise app.UsageError(f"{command} takes no table, got {names[0]!r}")
    if command in ("run", "time", "show", "check") and not names:
        raise app.UsageError(f"{command} needs a table, or all; there are {', '.join(TABLES)}")
    return command, names


def _at_scale(names: Sequence[str]) -> list[Table]:
    """The tables named; of `all`, those that have the scale."""
    if list(names) == ["all"]:
        return [table for table in TABLES.values() if SCALE.value in table.bases]
    return [table_of(name) for name in names]


if __name__ == "__main__":
    flags.run(main)
