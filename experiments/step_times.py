"""Times of training steps side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from structmat.analysis.timing import interleaved
from structmat.parallel import make_mesh, on_mesh, shard_batch
from structmat.training.build import compile_step, optimizer_for, step_for
from structmat.training.methods import rule_for
from structmat.training.state import create_state, plan_state
from structmat.training.task import Task


def step_times(runs: Sequence[tuple[ConfigDict, Task]], repeats: int) -> list[list[float]]:
    """Seconds of `repeats` training steps of each run, all taken in turn so that drift of the machine falls on all alike.

    The steps are the first ones after compiling, on a batch of zeros, with all that a method of the config does in them. All
    runs are held in memory at once, on the mesh of the first.
    """
    mesh = make_mesh(runs[0][0].mesh.to_dict())
    with on_mesh(mesh):
        calls = [_stepper(config, task, mesh) for config, task in runs]
        return interleaved(calls, [()] * len(calls), repeats)


def _stepper(config: ConfigDict, task: Task, mesh: Any) -> Callable[[], Any]:
    tx, schedule = optimizer_for(config, task)
    rule = rule_for(config, task.table)
    template = plan_state(task, tx, rule, mesh)
    compiled = compile_step(task, step_for(config, task, tx, rule, schedule), template, mesh)
    batch = shard_batch(mesh, {n: np.zeros(s.shape, s.dtype) for n, s in task.batch.items()}, config.batch)
    held = [create_state(task, tx, rule, template, config.seed)]

    def call() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return held[0], metrics

    return call
