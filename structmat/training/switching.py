"""A switch carried out: a run under way goes on with the same model in other structures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from structmat.optim import needs_gradient, restart
from structmat.surgery import Change, carry_optimizer, changed_params, restructure
from structmat.training.build import optimizer_for
from structmat.training.methods import without_method
from structmat.training.state import TrainState, plan_state, trained_variables, variables_of
from structmat.training.step import DROPOUT, gradients, step_key
from structmat.training.switch import Switch, passed
from structmat.training.task import Batch, Task, dump_tables

SURGERY = 2
"""Stream of randomness beside those of a step."""


@dataclasses.dataclass(frozen=True)
class Switched:
    """What a run goes on with after a switch; `row` is its `report`."""

    task: Task
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    template: TrainState
    state: TrainState
    row: dict[str, Any]


def carried_out(config: Any, switch: Switch, before: Task, mesh: Mesh, state: TrainState, batch: Batch) -> Switched:
    """The switch, to be called with the mesh set; no rule acts on what comes after it, and no method but one with a teacher,
    until the end of the run."""
    task = passed(config, before, switch)
    config = without_method(config) if switch.step == config.steps else config
    tx, schedule = optimizer_for(config, task)
    template = plan_state(task, tx, None, mesh)
    state, changes = switch_state(config, before, task, template, state, batch)
    return Switched(task, tx, schedule, template, state, report(switch.step, before, task, changes))


def switch_state(
    config: Any, before: Task, after: Task, template: TrainState, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Change]]:
    """The state for `after` out of the one of `before`; to be called with the mesh set.

    A pure function of its arguments, so that a run resumed just before a switch goes on with the same bits. Clock, skips and
    everything that belongs to unchanged leaves stay; what the optimiser keeps of changed ones starts as
    `structmat.optim.restart` says, with the gradient of `batch`, the one of the next step. What a Rule keeps goes where the
    template has none. Where a teacher begins it is a copy, for a step may overwrite the arrays of a state.

    Args:
      template: of the state after, from `plan_state`.

    Returns:
      The state, placed as the template says, and what became of every changed site.
    """
    key = jax.jit(lambda step: jax.random.fold_in(step_key(config.seed, step), SURGERY))(state.step)
    variables, changes = restructure(before.table, after.table, variables_of(state), variables_of(template), key)
    spec, changed = config.optim.to_dict(), changed_params(after.table, changes)
    if after.teacher is None or before.teacher is None:
        state = state.replace(teacher=None if after.teacher is None else _copied(state, template.teacher))

    def carry(state: TrainState, variables: Any, batch: Batch) -> Any:
        grads = variables["params"]  # of the right shapes; not read where no average of squares is kept
        if needs_gradient(spec):
            dropout = jax.random.fold_in(step_key(config.seed, state.step), DROPOUT)
            _, grads, _ = gradients(after, trained_variables(state) | variables, batch, dropout)
        restarted = restart(spec, grads, state.step - state.skips[1])
        return carry_optimizer(state.opt_state, template.opt_state, restarted, changed)

    places = jax.tree.map(lambda leaf: leaf.sharding, template.opt_state)
    opt_state = jax.jit(carry, out_shardings=places)(state, variables, batch)
    rule_state = state.rule_state if jax.tree.leaves(template.rule_state) else {}
    return state.replace(**variables, opt_state=opt_state, rule_state=rule_state), changes


def _copied(state: TrainState, template: Any) -> Any:
    """The variables of the state, placed as the template says."""
    places = jax.tree.map(lambda leaf: leaf.sharding, template)
    return jax.jit(lambda held: jax.tree.map(jnp.copy, held), out_shardings=places)(variables_of(state))


def noted(extra: Mapping[str, Any], task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """The `extra` of checkpoints after a switch: `task` is that of after it, `row` its report."""
    kept = {name: value for name, value in extra.items() if name not in ("sites", "teacher", "switches")}
    return kept | dump_tables(task) | {"switches": [*extra["switches"], row]}


def report(step: int, before: Task, after: Task, changes: Mapping[str, Change]) -> dict[str, Any]:
    """One entry of `metrics["switches"]` of a record, as JSON."""
    return {
        "step": step,
        "params_before": before.params,
        "params_after": after.params,
        "worst_error": max(change.error for change in changes.values()),
        "sites": {path: dataclasses.asdict(change) for path, change in changes.items()},
    }


def line(row: Mapping[str, Any]) -> str:
    """A report as one line."""
    sites = row["sites"]
    worst = max(sites, key=lambda path: sites[path]["error"])
    return (
        f"step {row['step']}: {len(sites)} site{'s' * (len(sites) > 1)} switched, worst relative error {row['worst_error']:.2g} at {worst}, "
        f"parameters {row['params_before']:,} -> {row['params_after']:,}"
    )
