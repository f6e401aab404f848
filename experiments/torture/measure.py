"""Runs figures one after the other; what is finished is on file and need not be run again."""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.torture.figures import Figure, Trial
from structmat.training import environment
from structmat.training.record import Record


def measure(figures: Mapping[str, Figure], chosen: Sequence[str], seed: int, out: Path, fresh: bool = False) -> Record:
    """Run the chosen figures that `out` does not have with this seed, or all of them if `fresh`.

    The Record is written after each, with its own date, command, seconds and commit; figures not chosen are kept.
    """
    found = Record.read(out).metrics["figures"] if out.exists() else {}
    began = time.monotonic()
    for key in chosen:
        if not fresh and key in found and found[key]["seed"] == seed:
            print(f"{key}: kept from {found[key]['date']}")
            continue
        print(f"{key}: {figures[key].title} ...", flush=True)
        found[key] = _one(figures[key], seed)
        print("".join(f"  {r['id']} {r['held']}/{r['tried']}  {r['title']}\n" for r in found[key]["rows"]), flush=True)
        Record.create(
            name="torture",
            kind="torture",
            config={"seed": seed, "figures": list(chosen)},
            structures={},
            seed=seed,
            data_hash="",
            seconds=time.monotonic() - began,
            metrics={"figures": {k: found[k] for k in figures if k in found}},
        ).write(out)
    return Record.read(out)


def _one(figure: Figure, seed: int) -> dict[str, Any]:
    """A figure's lines and what they were measured with; an exception counts as a case that did not hold."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture_", ignore_cleanup_errors=True) as folder:
        trial = Trial(figure, seed, Path(folder))
        try:
            figure.run(trial)
        except Exception as error:
            traceback.print_exc()
            trial.check("the figure itself", False, f"{type(error).__name__}: {error}")
    return {
        "rows": [dataclasses.asdict(row) | {"held": row.held, "ok": row.ok} for row in trial.rows],
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": environment.command(),
        "git": environment.versions().get("git", ""),
    }
