"""R9: the mesh does not matter: the same batches, and losses that differ by rounding only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Tiny
from structmat.parallel import local_rows, make_mesh, shard_batch
from structmat.training.config import validate
from structmat.training.loop import train

TOLERANCE = 1e-6
LAYOUTS = ((8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8), (2, 2, 2))
"""Sizes of (data, fsdp, tensor) over 8 devices; compared with one device."""
STRUCTURES = (
    "dense()",
    "monarch(blocks=4)",
    "kronecker(terms=2)",
    "low_rank(rank=4) + random_sparse(density=0.1)",
)


def losses(report: Callable[[Any], None], tinies: Sequence[Tiny], layouts: Sequence[tuple], folder: Path) -> None:
    """Reports (index, layout, loss of every step, SHA-256 of all batches as the devices hold them)."""
    for n, tiny in enumerate(tinies):
        for shape in layouts:
            config = tiny.config()
            config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape)))
            found: list[float] = []
            train(config, folder / f"{n}_{shape}", on_step=lambda step, row: found.append(row["loss"]))  # noqa: B023
            mesh, source, digest = make_mesh(config.mesh.to_dict()), validate(config).load(), hashlib.sha256()
            rows = local_rows(mesh, config.batch)
            for step in range(tiny.steps):
                batch = shard_batch(mesh, source.batch(step, rows), config.batch)
                for name in sorted(batch):
                    digest.update(np.asarray(batch[name]).tobytes())
            report((n, shape, found, digest.hexdigest()))


@figure("R9", f"f32 losses on other meshes within {TOLERANCE:g} relative of one device, over 30 steps", least=20)
def independence(
    trial: Trial, structures: Sequence[str] = STRUCTURES, layouts: Sequence[tuple] = LAYOUTS, steps: int = 30
) -> None:
    """Every structure on every layout of 8 CPU devices, with dropout."""
    same = trial.row("R9", "the same batches on every mesh, by hash")
    tinies = [Tiny(text, steps=steps, every=steps) for text in structures]
    ones = results(losses, tinies, [(1, 1, 1)], trial.folder / "one", log=trial.folder / "one.log")
    reference = {n: (np.array(found), digest) for n, _, found, digest in ones}
    worst = 0.0
    for n, shape, found, digest in results(
        losses, tinies, list(layouts), trial.folder / "eight", log=trial.folder / "eight.log", devices=8
    ):
        want, hashed = reference[n]
        error = float(np.max(np.abs(np.array(found) - want) / np.abs(want)))
        case, worst = f"{structures[n]} on {'x'.join(map(str, shape))}", max(worst, error)
        trial.check(case, len(found) == steps and error <= TOLERANCE, f"relative difference {error:.2e}")
        same.check(case, digest == hashed, "other batches")
    trial.notes["worst"] = f"{worst:.1e}"
