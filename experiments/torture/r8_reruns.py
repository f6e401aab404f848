"""R8: the same config run again, in another process, gives the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Drift, Tiny, examples
from structmat.parallel import make_mesh, on_mesh, shard_batch
from structmat.training.build import compile_step, optimizer_for, step_for
from structmat.training.config import validate
from structmat.training.state import create_state, plan_state

SUM = "low_rank(rank=4) + random_sparse(density=0.1)"


def digest_of(tiny: Tiny) -> str:
    """SHA-256 of all metrics of the run's steps and of the state they end with; nothing is saved or evaluated."""
    config, rule = tiny.config(), Drift() if tiny.rule else None
    task = validate(config)
    source, mesh = task.load(), make_mesh(config.mesh.to_dict())
    digest = hashlib.sha256()
    with on_mesh(mesh):
        tx, schedule = optimizer_for(config, task)
        template = plan_state(task, tx, rule, mesh)
        state = create_state(task, tx, rule, template, config.seed)
        step_fn = compile_step(task, step_for(config, task, tx, rule, schedule), template, mesh)
        for step in range(config.steps):
            state, metrics = step_fn(state, shard_batch(mesh, source.batch(step, None)))
            for leaf in jax.tree.leaves(metrics):
                digest.update(np.asarray(leaf).tobytes())
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def train_all(report: Callable[[Any], None], tinies: Sequence[Tiny]) -> None:
    """Reports (index, digest) of every run."""
    for n, tiny in enumerate(tinies):
        report((n, digest_of(tiny)))


@figure("R8", "every real family trained three times, each in another process: equal to the bit", least=25)
def reruns(trial: Trial, structures: Sequence[str] | None = None, times: int = 3, steps: int = 20) -> None:
    """Each of `structures` (default: every family's example, a sum) and one with a rule, `times` times.

    The second compiles anew what the first did, later ones load its compiled programs.
    """
    texts = [*examples(), SUM] if structures is None else structures
    tinies = [Tiny(text, steps=steps, every=steps) for text in texts] + [Tiny(rule=True, steps=steps, every=steps)]
    programs = trial.folder / "programs"
    caches = [None if n == 1 else programs for n in range(times)]  # compiled, compiled again, loaded
    found = [dict(results(train_all, tinies, log=trial.folder / f"{n}.log", cache=c)) for n, c in enumerate(caches)]
    for n, tiny in enumerate(tinies):
        digests = {each[n] for each in found}
        trial.check(tiny.structure + " with a rule" * tiny.rule, len(digests) == 1, f"{len(digests)} different results")
    trial.notes |= {"runs": times * len(tinies), "steps each": steps}
