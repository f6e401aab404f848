"""R6: wrong configs are refused before data is read or anything compiled, with field and value in the message."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from experiments.torture.bad_configs import Bad, bad_configs
from experiments.torture.children import Child
from experiments.torture.figures import Row, Trial, figure
from structmat.training.config import validate
from structmat.training.errors import ConfigError
from structmat.training.tasks import TASKS

SECONDS = 5.0
DEVICES = 8
LM, DIGITS = "--config=configs/demo_lm.py", "--config=configs/digits.py"
COMMANDS = (
    ([LM, "--config.optim.lrr=1"], "config.optim.lrr", "did you mean 'lr'"),
    ([LM, "--config.modle.width=3"], "config.modle", "did you mean 'model'"),
    ([LM, "--config.steps=2.5"], "steps", "2.5"),
    ([f"{LM}:monrach"], "monrach", "did you mean 'monarch'"),
    ([LM, "--config.optim.name=adam"], "config.optim.name = 'adam'", "did you mean 'adamw'"),
    ([DIGITS, "--config.batch=-1"], "config.batch = -1", "at least 1"),
    ([DIGITS, "--config.structure=low_rank(rank=100000)"], "config.structure = 'low_rank(rank=100000)'", "rank"),
    ([DIGITS, "--config.mesh.data=3"], "config.mesh", "nearest valid"),
    ([LM, "--config.data.root=/no/such/folder.npy"], "/no/such/folder.npy", ""),
    (["--config=configs/nope.py"], "configs/nope.py", "there is no file"),
)
"""Flags of `python -m experiments.train`, and what the answer has to hold."""


def fault(bad: Bad) -> str:
    """What is wrong with the answer to a config; "" if nothing."""
    start = time.monotonic()
    try:
        validate(bad.config, devices=DEVICES)
    except ConfigError as error:
        text, seconds = str(error), time.monotonic() - start
    else:
        return "accepted"
    if f"config.{bad.field}" not in text:
        return f"names no config.{bad.field}: {text[:200]}"
    if repr(bad.value) not in text and bad.field != "mesh":
        return f"does not show {bad.value!r}: {text[:200]}"
    axes = bad.value.items() if bad.field == "mesh" else ()
    if not all(f"{axis}={size}" in text for axis, size in axes if (axis, size) != ("replica", 1)):
        return f"does not show {bad.value!r}: {text[:200]}"
    return "" if seconds < SECONDS else f"took {seconds:.1f} s"


def suggested(bad: Bad) -> bool:
    """Whether the message offers what was meant."""
    try:
        validate(bad.config, devices=DEVICES)
    except ConfigError as error:
        return f"did you mean {bad.meant!r}" in str(error)
    return False


def refuse_all(row: Row, typos: Row, task: str, model: str, rng: random.Random, limit: int | None = None) -> None:
    """Check every bad config of a model (at most `limit` drawn ones); typos must be answered by what was meant."""
    cases = list(bad_configs(task, model, rng))
    for bad in cases if limit is None else rng.sample(cases, limit):
        why = fault(bad)
        row.check(f"{task}/{model} {bad.kind} {bad.field} = {bad.value!r}", not why, why)
        if bad.meant:
            typos.check(f"{task}/{model} {bad.field} = {bad.value!r}", suggested(bad), f"{bad.meant!r} not suggested")


def command(report: Callable[[Any], None], flags: list[str]) -> None:
    """`python -m experiments.train` with these flags, in this process."""
    from experiments import cli, train

    sys.argv = ["train", *flags]
    cli.run(train.main, train.flags)


def answer(flags: list[str], words: tuple[str, ...], folder: Path, n: int) -> str:
    """What is wrong with how a process answers; "" if nothing."""
    child, start = Child(command, [*flags, f"--workdir={folder / 'run'}"], log=folder / f"{n}.log"), time.monotonic()
    code, seconds = child.end(), time.monotonic() - start
    text = child.log.read_text()
    if code != 2 or "Traceback" in text or text.count("\n") > 10:
        return f"exit code {code}, {text.count(chr(10))} lines: {text[-300:]}"
    if missing := [word for word in words if word not in text]:
        return f"without {missing}: {text[-300:]}"
    if (folder / "run").exists():
        return "left a workdir"
    return "" if seconds < SECONDS else f"took {seconds:.1f} s"


@figure("R6", "bad configs refused: field and value named, no data read, nothing compiled, < 5 s", least=300)
def configs(trial: Trial, limit: int | None = None, commands: int = len(COMMANDS)) -> None:
    """Every bad config of every model of every task, then commands through real processes."""
    typos = trial.row("R6", "typos answered with the right suggestion", share=0.95)
    refuse = mock.Mock(side_effect=AssertionError("compiled, or read data"))
    patches = [mock.patch.object(jax.stages.Lowered, "compile", refuse)]
    patches += [mock.patch.object(module, "load", refuse) for module in TASKS.values()]
    for patch in patches:
        patch.start()
    try:
        for task, module in TASKS.items():
            for model in module.MODELS:
                before = trial.rows[0].tried
                refuse_all(trial.rows[0], typos, task, model, trial.random, limit)
                trial.notes[model] = trial.rows[0].tried - before
    finally:
        for patch in patches:
            patch.stop()
    answers = trial.row(
        "R6", "the same by the train command: exit code 2, a few lines, no workdir", least=len(COMMANDS)
    )
    for n, (flags, *words) in enumerate(COMMANDS[:commands]):
        why = answer(flags, tuple(words), trial.folder, n)
        answers.check(" ".join(flags), not why, why)
