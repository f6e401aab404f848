"""R3: SIGTERM at random moments of a run, start-up and compilation included: every step saved, exit code 0."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.torture.children import Child, results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Tiny, bits, run, saved
from structmat.training.workdir import RECORD, RUN

PACE = 0.02


def command(report: Callable[[Any], None], tiny: Tiny, folder: Path) -> None:
    """`run`, with the exit codes of `python -m experiments.train`."""
    from experiments import cli
    from experiments.own_flags import OwnFlags

    sys.argv = ["train"]
    cli.run(lambda: run(report, tiny, folder), OwnFlags())


def wait_for(path: Path, child: Child, seconds: float = 60) -> None:
    """Until a file is there, while the child lives."""
    until = time.monotonic() + seconds
    while not path.exists() and child.process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)


@figure("R3 single", "SIGTERM at random moments, single process: every step saved, exit 0, the same bits", least=10)
def sigterm(trial: Trial, moments: int = 10, span: float = 4.0) -> None:
    """One run gets `moments` signals, and is then let end.

    Each comes up to `span` seconds after a process has begun, every other one up to `span` after its first step. Saves
    on schedule are further apart than the run is long, so every save is a signal's. The exit code must be 0 and the
    last step taken the one saved; at the end state and metrics must have the bits of a run left alone.
    """
    steps = int(moments * span / PACE)
    tiny = Tiny("low_rank(rank=4) + random_sparse(density=0.05)", steps=steps, every=10 * steps, pace=PACE)
    unhurried = dataclasses.replace(tiny, pace=0.0)
    whole, parts, programs = (trial.folder / name for name in ("whole", "parts", "programs"))
    results(run, unhurried, whole, log=trial.folder / "whole.log")
    early = 0
    for n in range(moments):
        before, delay = saved(parts), trial.random.random() * span
        child = Child(command, tiny, parts, log=trial.folder / f"{n}.log", cache=programs)
        wait_for(parts / RUN, child)
        first = itertools.islice(child.reports(), n % 2)  # every other one is let begin its steps
        taken = [step for step, _ in first]
        child.process.join(delay)
        child.process.terminate()
        taken += [step for step, _ in child.reports()]
        code = child.end()
        after = saved(parts)
        early += after == before
        ok = code == 0 and after[-1:] == (taken[-1:] or before[-1:]) and not (parts / RECORD).exists()
        why = f"exit code {code}, last step {taken[-1:]}, saved {after}: {child.tail()}"
        trial.check(f"signal {n} after {delay:.2f} s", ok, why)
    child = Child(command, unhurried, parts, log=trial.folder / "last.log", cache=programs)
    rest, code = list(child.reports()), child.end()
    same = code == 0 and bits(parts) == bits(whole)
    trial.check(
        "the run that is left", same, f"exit code {code} after {len(rest)} steps, or other bits: {child.tail()}"
    )
    trial.notes["signals before a first step"] = early
