"""R1 and R4: kill -9 at random moments; every loss, and the state at the end, have the bits of a run left alone."""

from __future__ import annotations

import dataclasses
import time

from experiments.torture.children import Child, results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Tiny, bits, examples, run
from structmat.structures import FAMILIES

EVERY = 5
PACE = 0.1
"""Seconds between steps: longer than a save takes, as in a real run."""

KINDS = ("spectral", "kronecker", "n_m_sparse", "dictionary", "quantized", "butterfly", "householder")
"""Families of factors, masks, codes, fixed matrices and scans: what their checkpoints hold differs most."""


def kill(trial: Trial, tiny: Tiny, kills: int, delay: float = EVERY * PACE) -> None:
    """Kill one run `kills` times, once per window between saves and up to `delay` seconds after a drawn step.

    A kill holds if the process that follows it ends well or is killed in turn, all losses it reports are those of the
    undisturbed run, and the run that is left at the end has that run's state and metrics to the bit.
    """
    name, folder = tiny.structure + (" with a rule" if tiny.rule else ""), trial.folder / tiny.structure
    folder.mkdir()
    lost = trial.rows[1]
    unhurried = dataclasses.replace(tiny, pace=0.0)
    expected = dict(results(run, unhurried, folder / "whole", log=folder / "whole.log"))
    faults: list[str] = []
    last = 0
    for n in range(kills + 1):
        child = Child(run, tiny, folder / "parts", log=folder / f"{n}.log", cache=trial.folder / "programs")
        target, seen, wait = n * tiny.every + trial.random.randint(1, tiny.every), {}, trial.random.random()
        for step, loss in child.reports():
            seen[step] = loss
            if n < kills and step >= target and child.process.is_alive():
                time.sleep(wait * delay)
                child.process.kill()
                target = float("inf")
        code = child.end()
        if n < kills and code != -9:
            faults.append(f"process {n} was not killed but ended with {code}: {child.tail()}")
            break
        wrong = [step for step, loss in seen.items() if expected.get(step) != loss]
        fault = f"other losses at steps {wrong[:5]}" if wrong else "" if seen else f"made no step: {child.tail()}"
        if n == kills and code:
            fault = f"ended with {code}: {child.tail()}"
        if n:
            faults.append(fault)
            gone = last - min(seen, default=0) + 1
            worst = max(trial.rows[1].notes.get("worst", 0), gone)
            lost.notes["worst"] = worst
            lost.check(f"{name}, kill {n}", gone <= tiny.every + 2, f"{gone} steps")
        last = max(seen, default=0)
    same = len(faults) == kills and not any(faults) and bits(folder / "parts") == bits(folder / "whole")
    for n in range(kills):
        fault = faults[n] if n < len(faults) else "not reached"
        trial.check(f"{name}, kill {n + 1}", same, fault or "the run that is left differs from the undisturbed one")
    trial.notes["losses compared"] = trial.notes.get("losses compared", 0) + len(expected)


def many(trial: Trial, tinies: list[Tiny], kills: int) -> None:
    """Several runs, with a line for the steps lost."""
    trial.row("R4", f"steps lost per kill at most interval + 2 = {EVERY + 2}")
    for tiny in tinies:
        kill(trial, tiny, kills)


def long(structure: str, kills: int, rule: bool = False) -> Tiny:
    """A run with a window per kill, and four to spare for a machine that reacts late."""
    return Tiny(structure, rule, steps=EVERY * (kills + 4), every=EVERY, width=64, pace=PACE)


@figure("R1 dense", "kill -9, dense", least=20)
def dense(trial: Trial) -> None:
    """Twenty kills."""
    many(trial, [long("dense()", 20)], 20)


@figure("R1 indices", "kill -9, low_rank + random_sparse (index leaves)", least=20)
def indices(trial: Trial) -> None:
    """Twenty kills of a run with integer leaves."""
    many(trial, [long("low_rank(rank=4) + random_sparse(density=0.1)", 20)], 20)


@figure("R1 rule", "kill -9, masked dense with a rule that keeps state", least=20)
def rule(trial: Trial) -> None:
    """Twenty kills of a run with rule state."""
    many(trial, [long("masked(dense(), n_m_sparse(n=2, m=4))", 20, rule=True)], 20)


@figure("R1 kinds", "kill -9, a family of every kind of leaf and product, two kills each")
def kinds(trial: Trial) -> None:
    """Two kills each of `KINDS`."""
    many(trial, [long(FAMILIES[name].about.example, 2) for name in KINDS], 2)
    trial.notes["families"] = len(KINDS)


@figure("R1 others", "kill -9, every other family, two kills each")
def others(trial: Trial) -> None:
    """Two kills each of the examples of the families left."""
    taken = {"dense()", *(FAMILIES[name].about.example for name in KINDS)}
    texts = [text for text in examples() if text not in taken]
    many(trial, [long(text, 2) for text in texts], 2)
    trial.notes["families"] = len(texts)
