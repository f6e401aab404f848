"""R11: NaN in a batch, in one gradient or in one weight: updates skipped and counted, or an end that names the weight."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from experiments.torture.runs import Tiny
from structmat.parallel import unbox
from structmat.training import loop
from structmat.training.config import validate
from structmat.training.errors import RunError
from structmat.training.metrics import read_metrics
from structmat.training.state import abstract_variables
from structmat.training.step import leaf_paths
from structmat.training.task import Task

POISON = "poison"
"""Entry of a batch: number of the leaf whose gradient becomes NaN, from 1, or 0; the same in every row."""
MAX_SKIPS = 4
TINY = Tiny("low_rank(rank=4) + random_sparse(density=0.1)", steps=24, every=8, width=32)


def poisoned(task: Task, gradients: Mapping[int, int], batches: set[int]) -> Task:
    """The task with NaN in a gradient (batch number -> leaf number) or in the images of batches, from 0."""

    def loss(model: Any, variables: Any, batch: Any, rng: Any, train: bool) -> Any:
        leaves, tree = jax.tree.flatten(variables["params"])
        chosen = batch[POISON][0] - 1
        leaves = [_nan_gradient(leaf, chosen == n) for n, leaf in enumerate(leaves)]
        rest = {name: value for name, value in batch.items() if name != POISON}
        return task.loss(model, {**variables, "params": jax.tree.unflatten(tree, leaves)}, rest, rng, train)

    def load() -> Any:
        source = task.load()

        def batch(step: int, rows: range | None = None) -> dict[str, np.ndarray]:
            data = source.batch(step, rows)
            images = data["images"] * np.float32(math.nan if step in batches else 1)
            return data | {"images": images, POISON: np.full(len(images), gradients.get(step, 0), np.int32)}

        def heldout() -> Any:
            for data in source.heldout():
                yield data | {POISON: np.zeros(len(data["images"]), np.int32)}

        return dataclasses.replace(source, batch=batch, heldout=heldout)

    rows = next(iter(task.batch.values())).shape[0]
    shapes = {**task.batch, POISON: jax.ShapeDtypeStruct((rows,), jnp.int32)}
    return dataclasses.replace(task, loss=loss, batch=shapes, load=load)


@jax.custom_vjp
def _nan_gradient(x: jax.Array, here: jax.Array) -> jax.Array:
    return x


_nan_gradient.defvjp(
    lambda x, here: (x, here),
    lambda here, g: (jnp.where(here, jnp.asarray(math.nan, g.dtype), g), None),
)


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """A Rule that makes one entry of a weight NaN after step `at`, as a broken memory would."""

    at: int
    leaf: int
    needs_dense_gradients: bool = False

    def init(self, sites: Any, state: Any) -> dict[str, Any]:
        """Nothing kept."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """Once."""
        return step == self.at

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Any, state: Any) -> Any:
        """NaN in the first entry."""
        leaves, tree = jax.tree.flatten(state.params)
        flat = leaves[self.leaf].ravel().at[0].set(math.nan)
        leaves[self.leaf] = flat.reshape(leaves[self.leaf].shape)
        return state.replace(params=jax.tree.unflatten(tree, leaves))


def skipping(folder: Path, rng: random.Random, where: str, paths: list[str]) -> str:
    """A run with NaN `where` at some steps, never `MAX_SKIPS` in a row; what is wrong with it, "" if nothing."""
    steps = {n for n in range(TINY.steps) if n % MAX_SKIPS and rng.random() < 0.4} or {5}
    gradients = {n: rng.randint(1, len(paths)) for n in steps} if where == "gradient" else {}
    batches = steps if where == "batch" else set()
    if where == "factor":
        gradients = dict.fromkeys(steps, rng.choice([n for n, path in enumerate(paths, 1) if "layers_0" in path]))
    record = _train(folder, gradients, batches)
    rows = [row for row in read_metrics(folder) if "loss" in row]
    skipped = {int(row["step"]) - 1 for row in rows if row["skipped"]}
    if skipped != steps or record.metrics["skipped"] != len(steps):
        return f"NaN at {sorted(steps)}, skipped {sorted(skipped)}, counted {record.metrics['skipped']}"
    finite = [row["loss"] for row in rows if int(row["step"]) - 1 not in steps]
    finite += [row["param_norm"] for row in rows] + [record.metrics["heldout"]["loss"]]
    return "" if np.isfinite(finite).all() else "does not end finite"


def stopping(folder: Path, rng: random.Random, where: str, paths: list[str]) -> str:
    """A run with NaN from some step on; what is wrong with how it stops, "" if nothing."""
    first, leaf = rng.randrange(TINY.every, TINY.steps - MAX_SKIPS - 1), rng.randint(1, len(paths))
    steps = range(first, TINY.steps)
    rule = Corrupt(first, leaf - 1) if where == "weight" else None
    try:
        _train(folder, dict.fromkeys(steps, leaf) if where == "gradient" else {}, set(), rule)
    except RunError as error:
        text = str(error)
    else:
        return "did not stop"
    wanted = [f"stopped at step {first + MAX_SKIPS}:", f"first at {paths[leaf - 1]};", "last checkpoint: "]
    missing = [words for words in wanted if words not in text]
    return f"without {missing}: {text}" if missing else ""


def _train(folder: Path, gradients: Mapping[int, int], batches: set[int], rule: Any = None) -> Any:
    config = TINY.config()
    config.max_skips = MAX_SKIPS
    with mock.patch.object(loop, "validate", lambda config: poisoned(validate(config), gradients, batches)):
        return loop.train(config, folder, rule=rule)


def run_all(report: Callable[[Any], None], seed: str, each: int, stops: int, folder: Path) -> None:
    """Reports (whether it is to stop, case, what is wrong) of every run."""
    paths, rng = leaf_paths(unbox(abstract_variables(validate(TINY.config())))["params"]), random.Random(seed)
    for where, n in itertools.product(("batch", "gradient", "factor"), range(each)):
        report((False, f"{where} {n}", skipping(folder / f"{where}{n}", rng, where, paths)))
    for where, n in itertools.product(("gradient", "weight"), range(stops)):
        report((True, f"{where} {n}", stopping(folder / f"stop_{where}{n}", rng, where, paths)))


@figure("R11", "NaN in batches, gradients, one factor: updates skipped, counter right, ends finite", least=30)
def nan(trial: Trial, each: int = 10, stops: int = 5) -> None:
    """`each` runs with NaN at random steps per place, and `stops` per place in which it stays."""
    stopped = trial.row("R11", f"NaN that stays: stops after {MAX_SKIPS} steps and names the parameter", 2 * stops)
    args = (f"{trial.seed} R11", each, stops, trial.folder)
    for stop, case, why in results(run_all, *args, log=trial.folder / "log", cache=trial.folder / "programs"):
        (stopped if stop else trial.rows[0]).check(case, not why, why)
