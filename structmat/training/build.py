"""From a checked config to the pieces of a run: optimiser, compiled step, evaluation. Used by train and dry run alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from structmat.nn import sites
from structmat.optim import decay_mask, make_optimizer, make_schedule, multipliers
from structmat.parallel import batch_sharding, shard_batch, unbox
from structmat.training.accumulate import mean_over_parts
from structmat.training.methods import hook, rule_for, without_method
from structmat.training.rule import Rule
from structmat.training.state import TrainState, abstract_variables, plan_state, variables_of
from structmat.training.step import Step, make_step
from structmat.training.task import Batch, Source, Task, Teacher, Variables, mean_metrics, with_table

EvalStep = Callable[[Variables, Batch], dict[str, jax.Array]]


def optimizer_for(config: ConfigDict, task: Task) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain and its learning rate by update, with the multipliers of muP unless switched off."""
    params = unbox(abstract_variables(task))["params"]
    table = task.table
    scale = multipliers(table, sites(task.base, *task.example), params) if config.mup.enabled else None
    spec = config.optim.to_dict()
    tx = make_optimizer(spec, scale, decay_mask(table, params), config.steps)
    link = hook(config, "link", table)
    return tx if link is None else followed(tx, link), make_schedule(spec, config.steps)


def followed(tx: optax.GradientTransformation, link: optax.GradientTransformation) -> optax.GradientTransformation:
    """A chain with one more link. The other states keep their places, for a switch after which the link is gone."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, own = tx.update(updates, state[:-1], params)
        updates, last = link.update(updates, state[-1], params)
        return updates, (*own, last)

    return optax.GradientTransformation(lambda params: (*tx.init(params), link.init(params)), update)


def step_for(
    config: ConfigDict, task: Task, tx: optax.GradientTransformation, rule: Rule | None, schedule: optax.Schedule
) -> Step:
    """The step of a run, with what its method brings."""
    view, penalty = hook(config, "view", task.table), hook(config, "penalty", task.table)
    return make_step(task, tx, rule, schedule, config.seed, view, penalty)


def stored_plan(config: ConfigDict, task: Task, rule: Rule | None, mesh: Mesh, extra: Mapping[str, Any]) -> TrainState:
    """The template of a checkpoint with this `extra`: steps on two sides of a switch have other structures, and shapes.

    Args:
      rule: the Rule given to `train`, if one was.
    """
    own = stored_task(config, task, extra)
    config, rule = as_ended(config, rule, extra)
    return plan_state(own, optimizer_for(config, own)[0], rule_for(config, own.table, rule), mesh)


def stored_task(config: ConfigDict, task: Task, extra: Mapping[str, Any]) -> Task:
    """The task of a checkpoint with this `extra`: its structures, and the model it learns from."""
    own = with_table(task, extra["sites"])
    if "teacher" not in extra:
        return own
    lesson = hook(config, "teacher", own.table)
    return dataclasses.replace(own, teacher=Teacher(with_table(task, extra["teacher"]).model, lesson))


def as_ended(config: ConfigDict, rule: Rule | None, extra: Mapping[str, Any]) -> tuple[ConfigDict, Rule | None]:
    """The config and rule that go with a checkpoint: those of training end with a switch after the last step."""
    stages = extra["switches"]
    return (without_method(config), None) if stages and stages[-1]["step"] == config.steps else (config, rule)


def compile_step(task: Task, step: Step, template: TrainState, mesh: Mesh) -> jax.stages.Compiled:
    """The step compiled for the state's layout, state donated; to be called with the mesh set."""
    return lower_step(task, step, template, mesh).compile()


def lower_step(task: Task, step: Step, template: TrainState, mesh: Mesh) -> jax.stages.Lowered:
    """The program `compile_step` compiles."""
    sharded = batch_sharding(mesh)
    batch = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharded) for n, s in task.batch.items()}
    places = jax.tree.map(lambda leaf: leaf.sharding, template)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, PartitionSpec())))
    return jitted.lower(template, batch)


def make_eval_step(task: Task, mesh: Mesh) -> EvalStep:
    """(variables, batch) -> the loss's metrics without dropout, replicated."""

    def run(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        score = lambda _, part: task.loss(task.model, variables, part, None, False)
        return mean_over_parts(score, batch, task.accumulate)[1]

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def evaluate(eval_step: EvalStep, state: TrainState, source: Source, mesh: Mesh) -> dict[str, float]:
    """Means over the held-out batches."""
    variables = variables_of(state)
    parts: list[Any] = [eval_step(variables, shard_batch(mesh, batch)) for batch in source.heldout()]
    return mean_metrics(jax.device_get(parts))
