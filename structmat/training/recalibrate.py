"""Running statistics of batch normalisation taken anew, for weights that were changed after they were learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from structmat.models.resnet_v1 import MOMENTUM
from structmat.training.accumulate import mean_over_parts
from structmat.training.state import TrainState, variables_of
from structmat.training.task import BATCH_STATS, Batch, Task


def recalibrated(task: Task, state: TrainState, batches: Iterable[Batch]) -> TrainState:
    """The state with the mean over training batches of their statistics in place of the running ones; parameters stay.

    To be called with the mesh set. Horvath et al., ICML 2024, do so after components are cut away.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state.batch_stats)

    def statistics(state: TrainState, batch: Batch) -> Any:
        """Of one batch: from zeros a step moves by (1 - MOMENTUM) of them."""
        begun = variables_of(state) | {BATCH_STATS: jax.tree.map(jnp.zeros_like, state.batch_stats)}
        of_part = lambda number, part: task.loss(task.model, begun, part, jax.random.key(0), True)
        _, metrics = mean_over_parts(of_part, batch, task.accumulate)
        return jax.tree.map(lambda moved: moved / (1 - MOMENTUM), metrics[BATCH_STATS])

    one = jax.jit(statistics, out_shardings=places)
    found = [one(state, batch) for batch in batches]
    return state.replace(batch_stats=jax.tree.map(lambda *each: sum(each) / len(each), *found))
