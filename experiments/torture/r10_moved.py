"""R10, and R9 with several processes: a checkpoint saved on one layout goes on, on every other one."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from experiments.torture.groups import Group, Laid
from experiments.torture.runs import run, saved
from structmat.parallel import make_mesh, on_mesh
from structmat.training.build import optimizer_for
from structmat.training.checkpoint import Checkpointer
from structmat.training.config import validate
from structmat.training.state import plan_state

AFTER = 10
"""Steps before the move, and after it."""
TOLERANCE = 1e-6
LAYOUTS = ((1, 1, 1, 1), (1, 8, 1, 1), (1, 4, 1, 2), (1, 2, 1, 4), (1, 1, 1, 8), (2, 4, 2, 1), (4, 4, 1, 2))
"""Processes, and sizes of (data, fsdp, tensor)."""
STRUCTURE = "low_rank(rank=8) + random_sparse(density=0.125)"


def begin(report: Callable[[Any], None], tiny: Laid, folder: Path) -> None:
    """Train to the end in `folder`; reports every step's loss, then the arrays of step AFTER as process 0 sees them."""
    run(lambda row: report(("loss", row[0], float.fromhex(row[1]))), tiny, folder)
    report(("arrays", arrays(tiny, folder, AFTER)))


def move(report: Callable[[Any], None], moves: Sequence[tuple[Laid, Path]]) -> None:
    """Restore and go on, in each folder; reports (folder's name, arrays as they came) and (name, step, loss)."""
    for tiny, folder in moves:
        report((folder.name, arrays(tiny, folder, AFTER)))
        run(lambda row: report((folder.name, row[0], float.fromhex(row[1]))), tiny, folder)  # noqa: B023


def arrays(tiny: Laid, folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of every array of a checkpoint, whole, restored onto the mesh."""
    config = tiny.config()
    task, mesh = validate(config), make_mesh(config.mesh.to_dict())
    alone = folder.parent / f"{folder.name}_{step}"
    if jax.process_index() == 0:
        shutil.copytree(folder / "checkpoints" / str(step), alone / "checkpoints" / str(step), dirs_exist_ok=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"copied {alone.name}")
    with Checkpointer(str(alone)) as checkpoints, on_mesh(mesh):
        restored = checkpoints.restore(plan_state(task, optimizer_for(config, task)[0], None, mesh))
    if restored is None or restored.skipped:
        raise RuntimeError(f"step {step} of {folder.name} was not restored: {restored and restored.skipped}")
    whole = multihost_utils.process_allgather(restored.state, tiled=True)
    flat = jax.tree_util.tree_leaves_with_path(whole)
    digest = lambda leaf: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in flat}


def name(layout: tuple[int, ...]) -> str:
    """Such as 2 processes 4x2x1."""
    return f"{layout[0]} process{'es' * (layout[0] > 1)} {'x'.join(map(str, layout[1:]))}"


@figure("R10", "a checkpoint saved on one layout, restored on another: every array exact", least=42)
def moved(trial: Trial, layouts: Sequence[tuple[int, ...]] = LAYOUTS, pairs: Sequence | None = None) -> None:
    """Save on each layout, load on each other one (or in `pairs`, of indices into `layouts`), and train on."""
    on = trial.row("R10", f"the {AFTER} losses after the move within {TOLERANCE:g} relative of those on the old layout")
    alike = trial.row("R9", f"losses on layouts of several processes within {TOLERANCE:g} relative of one device")
    pairs = list(itertools.permutations(range(len(layouts)), 2) if pairs is None else pairs)
    tinies = [Laid(STRUCTURE, steps=2 * AFTER, every=AFTER, mesh=layout[1:]) for layout in layouts]
    stayed: list[dict[int, float]] = []
    known: list[dict[str, str]] = []
    for i, layout in enumerate(layouts):
        found = _on(layout, begin, tinies[i], trial.folder / str(i), trial=trial, logs=f"begin_{i}")
        stayed.append({row[1]: row[2] for row in found if row[0] == "loss"})
        known.append(next(row[1] for row in found if row[0] == "arrays"))
    for i, layout in enumerate(layouts):
        if i and layout[0] > 1:
            error = _difference(stayed[i], stayed[0])
            alike.check(
                name(layout), len(stayed[i]) == 2 * AFTER and error <= TOLERANCE, f"relative difference {error:.2e}"
            )
    worst = 0.0
    for target, layout in enumerate(layouts):
        sources = [a for a, b in pairs if b == target]
        folders = [_half(trial.folder, a, target) for a in sources]
        found = (
            _on(layout, move, [(tinies[target], f) for f in folders], trial=trial, logs=f"move_{target}")
            if sources
            else []
        )
        for source, folder in zip(sources, folders):
            case, rows = f"{name(layouts[source])} to {name(layout)}", [r[1:] for r in found if r[0] == folder.name]
            came, losses = rows[0][0], {row[0]: row[1] for row in rows[1:]}
            wrong = [path for path, digest in known[source].items() if came.get(path) != digest]
            trial.check(case, not wrong and came.keys() == known[source].keys(), f"differ: {wrong[:5]}")
            error = _difference(losses, stayed[source])
            worst = max(worst, error)
            steps = sorted(losses) == list(range(AFTER + 1, 2 * AFTER + 1))
            on.check(case, steps and error <= TOLERANCE, f"steps {sorted(losses)}, relative difference {error:.2e}")
    trial.notes["arrays each"] = len(known[0])
    on.notes["worst"] = f"{worst:.1e}"


def _on(layout: tuple[int, ...], target: Any, *args: Any, trial: Trial, logs: str) -> list[Any]:
    """The reports of the target on a layout, of process 0."""
    count, devices = layout[0], int(np.prod(layout[1:])) // layout[0]
    place = trial.folder / "logs" / logs
    if count > 1:
        return Group(target, *args, count=count, devices=devices, logs=place).finish()
    place.mkdir(parents=True)
    return results(target, *args, log=place / "0.log", devices=devices)


def _half(folder: Path, source: int, target: int) -> Path:
    """A copy of the run of a layout as it was after AFTER steps."""
    copy = folder / f"{source}_to_{target}"
    shutil.copytree(folder / str(source), copy)
    (copy / "record.json").unlink()
    for step in saved(copy):
        if step != AFTER:
            shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


def _difference(found: dict[int, float], wanted: dict[int, float]) -> float:
    return max((abs(loss - wanted[step]) / abs(wanted[step]) for step, loss in found.items()), default=float("inf"))
