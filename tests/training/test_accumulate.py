"""Parts of a batch in turn give what the whole batch gives, and send nothing between devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.parallel import make_mesh, on_mesh
from structmat.parallel.report import collectives
from structmat.training.accumulate import mean_over_parts
from structmat.training.build import compile_step, evaluate, make_eval_step, optimizer_for
from structmat.training.config import validate
from structmat.training.state import initial_state, plan_state
from structmat.training.step import make_step
from structmat.training.tasks.classification import PADDING
from tests.marks import mostly_long
from tests.training.small_runs import small_digits, small_lm
from tests.training.test_step import Ball


def close(a, b, tolerance=2e-6):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(float(np.abs(y).max()), 1e-3)
        np.testing.assert_allclose(x, y, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def started(task, config):
    return jax.jit(lambda: initial_state(task, optimizer_for(config, task)[0], None, jax.random.key(0)))()


def gradients_of(task, variables, batch):
    """(loss, gradients, metrics) of the batch."""

    def f(_, part):
        loss = lambda p: task.loss(task.model, {**variables, "params": p}, part, None, False)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return (value, grads), metrics

    return jax.jit(lambda batch: mean_over_parts(f, batch, task.accumulate))(batch)


@pytest.mark.parametrize("parts", mostly_long([2, 4], [4]))
def test_parts_with_unequal_counts_give_the_mean_of_the_whole(parts):
    task = validate(small_digits(structure="random_sparse(density=0.1)"))
    state = started(task, small_digits())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), state.params)
    variables = {"params": params, "frozen": state.frozen}
    batch = dict(task.load().batch(0, None))
    batch["labels"] = np.where(np.arange(32) % 4 == 0, PADDING, batch["labels"])  # a part without examples
    batch["labels"][[1, 5, 9, 2]] = PADDING
    whole = gradients_of(task, variables, batch)
    assert float(whole[1]["count"]) == 20
    close(gradients_of(dataclasses.replace(task, accumulate=parts), variables, batch), whole)


@pytest.mark.long
def test_a_step_in_parts_is_the_step():
    """Adam, a Rule that wants dense gradients, and the metrics; in the test above parts have padding, here none has."""
    config = small_digits(structure="low_rank(rank=4)", batch=16)
    task, rule = validate(config), Ball(every=1, radius=1e3)
    tx, schedule = optimizer_for(config, task)
    batch, outcomes = task.load().batch(0, None), []
    for parts in (1, 4):
        split = dataclasses.replace(task, accumulate=parts)
        state = jax.jit(lambda: initial_state(task, tx, rule, jax.random.key(0)))()
        step = jax.jit(make_step(split, tx, rule, schedule, 0))
        state, metrics = step(state.replace(params=jax.tree.map(lambda a: a + 0.1, state.params)), batch)
        outcomes.append(
            (state.params, state.rule_state["seen"], metrics["loss"], metrics["accuracy"], metrics["grad_norm"])
        )
    close(outcomes[1], outcomes[0], 2e-5)
    assert all(seen.any() for seen in jax.tree.leaves(outcomes[0][1]))


def test_every_part_has_its_own_dropout():
    config = small_digits(batch=8, accumulate=4)
    task = validate(config, devices=1)

    def loss(model, variables, batch, rng, train):
        value = jax.random.normal(rng) + 0 * variables["params"]["head"]["bias"].sum()
        return value, {"loss": value, "square": value**2, "count": jnp.float32(2)}

    task = dataclasses.replace(task, loss=loss)
    tx, schedule = optimizer_for(config, task)
    step = jax.jit(make_step(task, tx, None, schedule, 0))
    _, metrics = step(initial_state(task, tx, None, jax.random.key(0)), task.load().batch(0, None))
    assert float(metrics["square"]) > float(metrics["loss"]) ** 2 + 0.1  # equal draws have no variance


@pytest.mark.long
def test_evaluation_in_parts_agrees():
    config = small_digits(batch=64)
    task = validate(config, devices=1)
    state = started(task, config)
    rng = np.random.default_rng(0)
    state = state.replace(params=jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), state.params))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    found = []
    for parts in (1, 4):
        split = dataclasses.replace(task, accumulate=parts)
        found.append(evaluate(make_eval_step(split, mesh), state, split.load(), mesh))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.long
def test_parts_keep_their_rows_on_their_devices(tmp_path):
    """Sums of gradients are all that a replicated model sends: no collective moves the batch."""
    config = small_lm(tmp_path / "unread", batch=32, accumulate=4, mesh=dict(data=8, fsdp=1, tensor=1))
    task = validate(config)
    tx, schedule = optimizer_for(config, task)
    mesh = make_mesh(config.mesh.to_dict())
    with on_mesh(mesh):
        template = plan_state(task, tx, None, mesh)
        compiled = compile_step(task, make_step(task, tx, None, schedule, 0), template, mesh)
    assert set(collectives(compiled.as_text())) == {"all-reduce"}
