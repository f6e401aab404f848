"""Torture runs, and count what they survive.

    python -m experiments.torture [--only=R1,R5] [--seed=0] [--out=results/torture/cpu.json] [--fresh]

Figures already in `--out` with this seed are kept, so a stopped command goes on; `--fresh` measures them anew. Ends with
code 1 if anything did not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app

from experiments.own_flags import OwnFlags
from experiments.torture.figures import load_all
from experiments.torture.measure import measure
from experiments.torture.report import report
from structmat.structures.errors import suggest

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
    out = Path(_OUT.value)
    record = measure(figures, chosen, _SEED.value, out, _FRESH.value)
    failed = report(record, out)
    print(f"written: {out}, {out.with_suffix('.md')}")
    if failed:
        sys.exit(f"{failed} lines of the table do not hold")


if __name__ == "__main__":
    flags.run(main)
