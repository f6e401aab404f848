"""A trained model out of its run's folder: config, model with the stored structures, parameters, or its weights singly."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from structmat.nn.sites import Site, array_path, leaf_groups
from structmat.parallel import make_mesh, on_mesh
from structmat.structures import flatten_leaves
from structmat.structures.rules import matching
from structmat.training import workdir
from structmat.training.build import stored_plan
from structmat.training.checkpoint import Checkpointer
from structmat.training.config import completed, validate
from structmat.training.errors import RunError
from structmat.training.rule import Rule
from structmat.training.state import variables_of
from structmat.training.task import Task, with_table


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's newest checkpoint that verifies.

    Attributes:
      config: as it was trained. task: with the model of the checkpoint's site table.
      variables: {"params": ..., "frozen": ...}, and "batch_stats" where the model has any. step: of the checkpoint.
    """

    config: ConfigDict
    task: Task
    variables: dict[str, Any]
    step: int


def load_run(folder: str | Path, rule: Rule | None = None, devices: Sequence[jax.Device] | None = None) -> Run:
    """Read the run in `folder`, on whatever mesh it was trained.

    Args:
      rule: the Rule given to `train`, if one was, whose state is in the checkpoint.
      devices: where to put it, split over the tensor axis; default the first one of this process.

    Raises:
      RunError: no run there, or none with a checkpoint. CheckpointError: none of its checkpoints verifies.

    Examples:
      >>> load_run("runs/none")
      Traceback (most recent call last):
          ...
      structmat.training.errors.RunError: 'runs/none' holds no run (config.json is missing); give the --workdir of a training run
    """
    devices = jax.local_devices()[:1] if devices is None else devices
    with Checkpointer(str(folder)) as checkpoints:
        config, task, _ = _newest(folder, checkpoints, len(devices))
        mesh = make_mesh(config.mesh.to_dict(), devices)
        with on_mesh(mesh):
            restored = checkpoints.restore(functools.partial(stored_plan, config, task, rule, mesh))
    task = with_table(task, restored.extra["sites"])
    return Run(config, task, variables_of(restored.state), restored.step)


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """The weights of a run's newest checkpoint that verifies, still on disk.

    Attributes:
      config: as it was trained. table: layer path -> Site. step: of the checkpoint.
      readers: layer path -> a callable that reads the weight as a dense (d_in, d_out) matrix; weights of one stored
        array follow one another.
    """

    config: ConfigDict
    table: dict[str, Site]
    step: int
    readers: dict[str, Callable[[], jax.Array]]


def stored_weights(folder: str | Path, match: str | None = None) -> StoredWeights:
    """The weights of the run in `folder`, to be read one at a time; loads none of them.

    The layers of a scanned group are one stored array, which is read once for all of them and then sliced; so called in
    their order the readers keep one stored array in memory, whatever the size of the model.

    Args:
      match: regex the whole layer path must match, such as `layers_.*/mlp/.*`; default all sites of kind `linear`.

    Raises:
      RunError, CheckpointError: as `load_run`. StructureError: nothing matches, near paths are listed.
    """
    with Checkpointer(str(folder)) as checkpoints:
        config, task, step = _newest(folder, checkpoints, 1)
    table = task.table
    hits = [p for p, s in table.items() if s.kind == "linear"] if match is None else matching(match, table)
    if not hits:
        raise RunError(f"{str(folder)!r} has no linear weights; give a pattern over: {', '.join(table)}")
    shelf, places = _Shelf(str(folder), step), list(leaf_groups(table))
    hits.sort(key=lambda path: places.index(array_path(path, table[path])))
    return StoredWeights(config, table, step, {p: functools.partial(shelf.dense, p, table[p]) for p in hits})


class _Shelf:
    """Holds the stored arrays of one site, dropped before those of the next are read."""

    def __init__(self, folder: str, step: int):
        self._folder, self._step = folder, step
        self._place: tuple[str, ...] | None = None
        self._params: dict[str, Any] = {}

    def dense(self, path: str, site: Site) -> jax.Array:
        """The site's weight (d_in, d_out)."""
        place = array_path(path, site)
        if place != self._place:
            self._place, self._params = None, {}
            self._params = self._read(place, site)
            self._place = place
        params = self._params
        if site.stack is not None:
            params = jax.tree.map(lambda a: a[site.stack.index], params)
        if site.stack is None or site.stack.index == site.stack.size - 1:
            self._place, self._params = None, {}
        return site.bound.materialize(params)

    def _read(self, place: tuple[str, ...], site: Site) -> dict[str, Any]:
        names = {
            name: "/".join(("params" if leaf.trainable else "frozen", *place, name))
            for name, leaf in flatten_leaves(site.bound.leaves())
        }
        with Checkpointer(self._folder) as checkpoints:
            arrays = checkpoints.read(self._step, names.values())
        params: dict[str, Any] = {}
        for name, stored in names.items():
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = arrays[stored]
        return params


def _newest(folder: str | Path, checkpoints: Checkpointer, devices: int) -> tuple[ConfigDict, Task, int]:
    """Config on a mesh of `devices`, task with the stored site table, and step of the newest intact checkpoint."""
    if not (Path(folder) / workdir.RUN).is_file():
        raise RunError(f"{str(folder)!r} holds no run ({workdir.RUN} is missing); give the --workdir of a training run")
    found = checkpoints.latest()
    if found is None:
        raise RunError(f"{str(folder)!r} has no checkpoint yet; train for longer, or lower checkpoint.every")
    config = completed(ConfigDict(json.loads(json.dumps(found.extra["config"]))))
    config.mesh = ConfigDict(dict(replica=1, data=1, fsdp=1, tensor=devices))
    return config, with_table(validate(config, devices), found.extra["sites"]), found.step
