"""A trained model out of its run's folder: config, model with the stored structures, parameters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from structmat.parallel import make_mesh, on_mesh
from structmat.training import workdir
from structmat.training.build import optimizer_for
from structmat.training.checkpoint import Checkpointer
from structmat.training.config import validate
from structmat.training.errors import RunError
from structmat.training.rule import Rule
from structmat.training.state import plan_state, variables_of
from structmat.training.task import Task, with_table


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's newest checkpoint that verifies.

    Attributes:
      config: as it was trained. task: with the model of the checkpoint's site table.
      variables: {"params": ..., "frozen": ...}. step: of the checkpoint.
    """

    config: ConfigDict
    task: Task
    variables: dict[str, Any]
    step: int


def load_run(folder: str | Path, rule: Rule | None = None, devices: Sequence[jax.Device] | None = None) -> Run:
    """Read the run in `folder`, on whatever mesh it was trained.

    Args:
      rule: the Rule it was trained with, whose state is in the checkpoint.
      devices: where to put it, split over the tensor axis; default the first one of this process.

    Raises:
      RunError: no run there, or none with a checkpoint. CheckpointError: none of its checkpoints verifies.
    """
    if not (Path(folder) / workdir.RUN).is_file():
        raise RunError(f"{str(folder)!r} holds no run ({workdir.RUN} is missing); give the --workdir of a training run")
    with Checkpointer(str(folder)) as checkpoints:
        found = checkpoints.latest()
        if found is None:
            raise RunError(f"{str(folder)!r} has no checkpoint yet; train for longer, or lower checkpoint.every")
        config = ConfigDict(json.loads(json.dumps(found.extra["config"])))
        devices = jax.local_devices()[:1] if devices is None else devices
        config.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=len(devices)))
        task = with_table(validate(config, len(devices)), found.extra["sites"])
        mesh = make_mesh(config.mesh.to_dict(), devices)
        with on_mesh(mesh):
            tx, _ = optimizer_for(config, task)
            restored = checkpoints.restore(plan_state(task, tx, rule, mesh))
    return Run(config, task, variables_of(restored.state), restored.step)
