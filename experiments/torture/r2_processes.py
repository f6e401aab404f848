"""R2, and R3 with several processes: one or all of 2 and 4 processes killed, or asked to stop; the run goes on."""

from __future__ import annotations

import dataclasses
import time

from experiments.torture.figures import Row, Trial, figure
from experiments.torture.groups import Group
from experiments.torture.runs import Tiny, bits, run, saved
from structmat.parallel.distributed import LOST
from structmat.training.workdir import RECORD

EVERY = 4
PACE = 0.1
LEAVE = 30.0
"""Seconds a survivor has to leave."""


@figure("R2", "kill -9 of one or all of 2 and 4 processes: resumed to the bit", least=10)
def processes(trial: Trial, counts: dict[int, tuple[str, ...]] | None = None) -> None:
    """Kill `one` drawn process, the `first` (it coordinates), or `all`, in turn; `counts`: processes -> kills."""
    row = trial.row("R2", f"survivors leave within {LEAVE:.0f} s with a line that names the process lost")
    for count, kills in (
        counts or {2: ("one", "first", "all", "one", "first", "all"), 4: ("one", "first", "all", "one")}
    ).items():
        _kill(trial, row, count, kills)


def _kill(trial: Trial, row: Row, count: int, kills: tuple[str, ...]) -> None:
    folder = trial.folder / str(count)
    tiny = Tiny("low_rank(rank=4) + random_sparse(density=0.1)", steps=EVERY * (len(kills) + 3), every=EVERY, pace=PACE)
    start = lambda tiny, name, logs: Group(
        run, tiny, folder / name, count=count, devices=4 // count, logs=folder / logs, cache=folder / "programs"
    )
    expected = dict(start(dataclasses.replace(tiny, pace=0.0), "whole", "whole_logs").finish())
    faults: list[str] = []
    for n, kind in enumerate((*kills, "")):
        group = start(tiny, "parts", f"logs_{n}")
        target, seen, began = n * EVERY + trial.random.randint(1, EVERY), {}, 0.0
        drawn = trial.random.randrange(count)
        victims = {"one": [drawn], "first": [0], "all": list(range(count)), "": []}[kind]
        for step, loss in group.members[0].reports():
            seen[step] = loss
            if kind and step >= target:
                time.sleep(trial.random.random() * EVERY * PACE)
                for i in victims:
                    group.members[i].process.kill()
                target, began = float("inf"), time.monotonic()
        codes = group.end(2 * LEAVE)
        seconds = time.monotonic() - began
        wrong = [step for step, loss in seen.items() if expected.get(step) != loss]
        fault = f"other losses at steps {wrong[:5]}" if wrong else "" if seen else f"no step: {group.members[0].tail()}"
        wanted = [-9 if i in victims else LOST if kind else 0 for i in range(count)]
        faults.append(fault or ("" if codes == wanted else f"exit codes {codes}, not {wanted}"))
        for i in set(range(count)) - set(victims) if kind else ():
            said, named = (
                group.members[i].log.read_text(),
                any(f"process {v} of {count} (" in _line(group, i) for v in victims),
            )
            ok = codes[i] == LOST and seconds < LEAVE and named
            row.check(
                f"{count} processes, kill {n + 1}, process {i}", ok, f"{codes[i]} after {seconds:.1f} s: {said[-300:]}"
            )
            row.notes["slowest s"] = max(row.notes.get("slowest s", 0.0), round(seconds, 1))
    same = not any(faults) and bits(folder / "parts") == bits(folder / "whole")
    for n, kind in enumerate(kills):
        fault = next(filter(None, faults[n : n + 2]), "") or next(filter(None, faults), "other bits at the end")
        trial.check(f"{count} processes, kill {n + 1} ({kind})", same, fault)


def _line(group: Group, index: int) -> str:
    """What a process says when it stops because of another."""
    lines = group.members[index].log.read_text().splitlines()
    return next((line for line in lines if line.startswith("stopped: ")), "")


@figure("R3 processes", "SIGTERM to one of 2 processes: all exit 0 with every step saved, the same bits", least=6)
def sigterm(trial: Trial, moments: int = 6, room: int = 60) -> None:
    """One run of two processes, one of which gets SIGTERM after a drawn step; saves on schedule never come.

    Args:
      room: steps for each signal: jax looks about once a second whether one came, and then agrees on a step.
    """
    tiny = Tiny("low_rank(rank=4)", steps=room * (moments + 1), every=10**6, pace=0.05)
    start = lambda tiny, name: Group(
        run,
        tiny,
        trial.folder / name,
        count=2,
        devices=2,
        logs=trial.folder / f"{name}_logs",
        cache=trial.folder / "programs",
    )
    start(dataclasses.replace(tiny, pace=0.0), "whole").finish()
    parts = trial.folder / "parts"
    for n in range(moments):
        group, wait, taken, asked = start(tiny, "parts"), trial.random.randint(1, 8), [], 0.0
        for step, _ in group.members[0].reports():
            taken.append(step)
            if len(taken) == wait:
                group.members[trial.random.randrange(2)].process.terminate()
                asked = time.monotonic()
        codes, after = group.end(), saved(parts)
        seconds = round(time.monotonic() - asked, 1)
        ok = codes == [0, 0] and after[-1:] == taken[-1:] and not (parts / RECORD).exists()
        why = f"exit codes {codes}, asked at {taken[:1]} + {wait}, last step {taken[-1:]}, saved {after}"
        trial.check(f"signal {n}", ok, f"{why}: {group.members[0].tail()}")
        trial.notes["slowest s"] = max(trial.notes.get("slowest s", 0.0), seconds)
    start(dataclasses.replace(tiny, pace=0.0), "parts").finish()
    trial.check("the run that is left", bits(parts) == bits(trial.folder / "whole"), "other bits")
