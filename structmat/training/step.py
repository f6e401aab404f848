"""One step of training as a pure function of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from structmat.nn.method import Penalty, View
from structmat.training.accumulate import mean_over_parts
from structmat.training.applied import Taught, Twice
from structmat.training.rule import Rule, dense_gradients, wanted_parts, wanted_sites
from structmat.training.state import TrainState, trained_variables, variables_of
from structmat.training.task import BATCH_STATS, VIEWED, Batch, Task, Variables

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
DROPOUT, RULE, VIEW = 0, 1, 3
"""Streams of randomness within a step; a switch takes one between them."""


def make_step(
    task: Task,
    tx: optax.GradientTransformation,
    rule: Rule | None,
    schedule: optax.Schedule,
    seed: int,
    view: View | None = None,
    penalty: Penalty | None = None,
) -> Step:
    """The step, to be jitted with the state donated.

    Only `params` are differentiated, over `task.accumulate` parts of the batch in turn. Complex gradients are conjugated
    once, so that stepping against them descends. Where the loss, a gradient or an update is not finite, everything but the
    clock and the skip counters stays as it was. The rule acts after the optimiser, on the steps that are due, and sees the
    new parameters. `view` and `penalty` are those of `structmat.nn.method.Method`; metrics then have the `penalty`, which
    the loss is without. A teacher of the task adds its terms to the loss, and metrics have these too.

    Returns:
      (state, batch) -> (state, metrics). Metrics are scalars, but for `bad`: bool (leaves of params,), which parameters
      are not finite; if all are, which gradients were not; if all were, which updates.
    """
    table = task.table

    def whole_loss(variables: Any, dropout: jax.Array, batch: Batch) -> jax.Array:
        """The mean loss; its gradient computes each part again instead of keeping all activations."""
        of_part = lambda number, part: _loss(task, variables, dropout, number, part)
        of_part = jax.checkpoint(of_part) if task.accumulate > 1 else of_part
        return mean_over_parts(of_part, batch, task.accumulate)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = step_key(seed, state.step)
        dropout = jax.random.fold_in(key, DROPOUT)
        seen = trained_variables(state)
        if view is not None:
            place = VIEWED if task.full_pass else "frozen"
            seen[place] = view(state.frozen, jax.random.fold_in(key, VIEW), state.step)
        value, grads, metrics = gradients(task, seen, batch, dropout)
        statistics = metrics.pop(BATCH_STATS, state.batch_stats)
        if penalty is not None:
            by_params = lambda params: penalty({**variables_of(state), "params": params}, state.step)
            metrics["penalty"], more = jax.value_and_grad(by_params)(state.params)
            grads = jax.tree.map(lambda g, m: g + (m.conj() if jnp.iscomplexobj(m) else m), grads, more)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        grad_sq, update_sq = _squares(grads), _squares(updates)
        ok = jnp.isfinite(value) & jnp.isfinite(grad_sq).all() & jnp.isfinite(update_sq).all()

        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        skipped = (~ok).astype(jnp.int32)
        new = state.replace(
            step=state.step + 1,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            opt_state=keep(opt_state, state.opt_state),
            skips=jnp.stack([(state.skips[0] + 1) * skipped, state.skips[1] + skipped]),
            batch_stats=keep(statistics, state.batch_stats),
        )

        def act(now: TrainState) -> TrainState:
            grads = {}
            wanted, parts = wanted_sites(rule, table), wanted_parts(rule, table)
            if wanted or parts:
                grads = dense_gradients(lambda v: whole_loss(v, dropout, batch), variables_of(now), wanted, parts)
            return rule.update(jax.random.fold_in(key, RULE), now.step, grads, now)

        if rule is not None:
            new = jax.lax.cond(ok & rule.due(new.step), act, lambda now: now, new)
        param_sq = _squares(new.params)
        # A weight spoils every gradient, and clipping by the global norm spreads one gradient over all updates.
        bad = jnp.zeros(param_sq.shape, bool)
        for squares in (update_sq, grad_sq, param_sq):
            bad = jnp.where(jnp.isfinite(squares).all(), bad, ~jnp.isfinite(squares))
        metrics = {name: m for name, m in metrics.items() if name != "count"} | {
            "grad_norm": jnp.sqrt(grad_sq.sum()),
            "update_norm": jnp.sqrt(update_sq.sum()),
            "param_norm": jnp.sqrt(param_sq.sum()),
            "lr": jnp.asarray(schedule(state.step - state.skips[1]), jnp.float32),
            "skipped": new.skips[0],
            "skipped_total": new.skips[1],
            "bad": bad,
        }
        return new, metrics

    return step


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The randomness of the step after `step` steps."""
    return jax.random.fold_in(jax.random.key(seed), step)


def gradients(
    task: Task, variables: Variables, batch: Batch, dropout: jax.Array
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """Mean loss of a batch, its gradient by `params` as optax takes it (complex ones conjugated), and metrics with `count`;
    over `task.accumulate` parts of the batch in turn. `variables` are those of `trained_variables`."""

    def of_part(number: Any, part: Batch) -> tuple[Any, dict[str, jax.Array]]:
        by_params = lambda p: _loss(task, {**variables, "params": p}, dropout, number, part)
        (value, metrics), grads = jax.value_and_grad(by_params, has_aux=True)(variables["params"])
        return (value, grads), metrics

    (value, grads), metrics = mean_over_parts(of_part, batch, task.accumulate)
    return value, jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grads), metrics


def _loss(
    task: Task, variables: Variables, dropout: jax.Array, number: Any, part: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of one part of a batch, each with its own dropout."""
    key = jax.random.fold_in(dropout, number) if task.accumulate > 1 else dropout
    model = task.model if task.teacher is None else Taught(task.model, task.teacher)
    model = Twice(task.model) if VIEWED in variables else model
    return task.loss(model, variables, part, key, True)


def leaf_paths(params: Any) -> list[str]:
    """Slash paths in the order of the entries of `bad`."""
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)]


def _squares(tree: Any) -> jax.Array:
    """f32 (leaves,): squared norm of each leaf."""
    return jnp.stack([jnp.sum(jnp.square(jnp.abs(leaf)).astype(jnp.float32)) for leaf in jax.tree.leaves(tree)])
