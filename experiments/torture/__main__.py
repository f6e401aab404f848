"""Torture runs, and count what they survive.

    python -m experiments.torture [--only=R1,R5] [--seed=0] [--out=results/torture/cpu.json] [--fresh]

Figures already in `--out` with this seed are kept, so a stopped command goes on; `--fresh` measures them anew. Ends with
code 1 if anything did not hold.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app

from experiments.own_flags import OwnFlags
from experiments.torture.figures import Trial, load_all
from experiments.torture.report import as_json, report
from structmat.structures.errors import suggest
from structmat.training import environment
from structmat.training.record import Record

flags = OwnFlags()
_ONLY = flags.DEFINE_list("only", [], "figures, such as R1,R5, or 'R1 dense'; default all")
_SEED = flags.DEFINE_integer("seed", 0, "of all that is random", lower_bound=0)
_OUT = flags.DEFINE_string("out", "results/torture/cpu.json", "Record JSON to go on with; a table is written beside it")
_FRESH = flags.DEFINE_bool("fresh", False, "measure again what --out already has")


def main(argv: Sequence[str]) -> None:
    """Run the figures asked for, writing the Record after each."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    jax.config.update("jax_platforms", "cpu")
    figures = load_all()
    valid = [*figures, *dict.fromkeys(key.split()[0] for key in figures)]
    for name in _ONLY.value:
        if name not in valid:
            raise app.UsageError(f"--only={name}: no such figure" + suggest(name, valid))
    chosen = [k for k in figures if not _ONLY.value or k in _ONLY.value or k.split()[0] in _ONLY.value]
    out, began = Path(_OUT.value), time.monotonic()
    kept = Record.read(out).metrics["figures"] if out.exists() else {}
    kept = {k: f for k, f in kept.items() if f["seed"] == _SEED.value and not (_FRESH.value and k in chosen)}
    for key in chosen:
        if key in kept:
            print(f"{key}: kept from {kept[key]['date']}")
            continue
        print(f"{key}: {figures[key].title} ...", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture_", ignore_cleanup_errors=True) as folder:
            trial = Trial(figures[key], _SEED.value, Path(folder))
            try:
                figures[key].run(trial)
            except Exception as error:
                traceback.print_exc()
                trial.check("the figure itself", False, f"{type(error).__name__}: {error}")
        kept[key] = {
            "rows": [as_json(row) for row in trial.rows],
            "seed": _SEED.value,
            "seconds": round(time.monotonic() - start, 1),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": environment.command(),
            "git": environment.versions().get("git", ""),
        }
        print("".join(f"  {r.id} {r.held}/{r.tried}  {r.title}\n" for r in trial.rows), end="", flush=True)
        Record.create(
            name="torture",
            kind="torture",
            config={"seed": _SEED.value, "only": _ONLY.value},
            structures={},
            seed=_SEED.value,
            data_hash="",
            seconds=time.monotonic() - began,
            metrics={"figures": {k: kept[k] for k in figures if k in kept}},
        ).write(out)
    if not kept:
        return
    failed = report(Record.read(out), out)
    print(f"written: {out}, {out.with_suffix('.md')}")
    if failed:
        sys.exit(f"{failed} lines of the table do not hold")


if __name__ == "__main__":
    flags.run(main)
