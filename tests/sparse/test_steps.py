"""SET and RigL within the training step of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.sparse import rules_text
from structmat.training import loop
from structmat.training.build import optimizer_for
from structmat.training.config import default, validate
from structmat.training.methods import rule_for
from structmat.training.rule import dense_gradients, wanted_sites
from structmat.training.state import initial_state, variables_of
from structmat.training.step import make_step
from tests.training.small_runs import small_digits, small_lm

MASKED = "masked(dense(), unstructured(density=0.25), rule='plain')"


def stepper(config):
    task = validate(config, devices=1)
    tx, schedule = optimizer_for(config, task)
    rule = rule_for(config, task.table)
    state = jax.jit(lambda: initial_state(task, tx, rule, jax.random.key(0)))()
    return task, state, make_step(task, tx, rule, schedule, 0)


@pytest.fixture(scope="module")
def run():
    """(task, batches, states with RigL up to its update at step 4, and after that step without it)."""
    config = small_digits(structure=MASKED, method="rigl(every=4, drop=0.5)")
    config.optim.update(lr=0.02, warmup=1.0)
    task, state, step = stepper(config)
    tx, schedule = optimizer_for(config, task)
    plain = make_step(task, tx, None, schedule, 0)
    source = task.load()
    batches = [source.batch(i, None) for i in range(4)]
    both = jax.jit(lambda s, b: (step(s, b)[0], plain(s, b)[0]))
    states = [state]
    for batch in batches:
        new, without = both(states[-1], batch)
        states.append(new)
    return task, batches, states, without


def mask_of(state):
    return np.asarray(state.frozen["layers_0"]["mask"])


def kernel_of(tree):
    return np.asarray(tree["layers_0"]["weights"]["kernel"])


def test_outside_updates_masked_entries_stay_and_have_no_moments(run):
    _, _, states, _ = run
    for state in states[1:4]:
        np.testing.assert_array_equal(mask_of(state), mask_of(states[0]))
    off = ~mask_of(states[0])
    adam = next(s for s in states[3].opt_state if hasattr(s, "mu"))
    assert np.all(kernel_of(adam.mu)[off] == 0) and np.all(kernel_of(adam.nu)[off] == 0)
    assert np.mean(kernel_of(adam.mu)[~off] != 0) > 0.7  # pixels that are always blank have no gradient


def test_growth_follows_the_gradient_by_the_unmasked_weight(run):
    """At the parameters after the optimiser; dense(), with the masked matrix as its kernel, has that gradient."""
    task, batches, states, without = run
    old, new = mask_of(states[3]), mask_of(states[4])
    w = kernel_of(without.params)
    dense = task.with_model(task.model.clone(structures=()))
    params = {**without.params, "layers_0": {**without.params["layers_0"], "kernel": np.where(old, w, 0)}}
    del params["layers_0"]["weights"]
    loss = lambda p: task.loss(dense.model, {"params": p}, batches[3], jax.random.key(0), True)[0]
    grad = np.abs(np.asarray(jax.jit(jax.grad(loss))(params)["layers_0"]["kernel"]))
    drop = int(0.25 * (1 + np.cos(np.pi * 4 / 10)) * 256)
    kept = np.zeros_like(old)
    kept.flat[sorted(np.flatnonzero(old), key=lambda i: -abs(w.flat[i]))[: 256 - drop]] = True
    grown = new & ~kept
    assert new.sum() == 256 and grown.sum() == drop and not (kept & ~new).any()
    assert grad[grown].min() >= 0.999 * grad[~kept & ~grown].max() > 0
    assert (grown & ~old).sum() > drop // 2


def test_an_update_changes_the_function_by_the_dropped_weights_alone(run):
    _, _, states, without = run
    old, new = mask_of(states[3]), mask_of(states[4])
    np.testing.assert_array_equal(kernel_of(states[4].params), np.where(old & new, kernel_of(without.params), 0))
    kept = lambda tree: {**tree, "layers_0": tree["layers_0"]["bias"]}
    same = jax.tree.map(lambda a, b: bool((a == b).all()), kept(states[4].params), kept(without.params))
    assert all(jax.tree.leaves(same))
    for leaf in (s for s in states[4].opt_state if hasattr(s, "mu")):
        assert np.all(kernel_of(leaf.mu)[~(old & new)] == 0) and np.any(kernel_of(leaf.mu)[old & new] != 0)


@pytest.mark.long
def test_terms_of_sums_in_scanned_layers_move_by_their_own_gradients(tmp_path):
    """Beside sites in the same layers that have no mask, and whose gradients are not asked for."""
    structure = f"layers_.*/mlp/.* -> low_rank(rank=2) + {MASKED}"
    config = small_lm(tmp_path, structure=structure, method="rigl(every=1, drop=0.5)")
    config.model.layers = 2
    task, state, step = stepper(config)
    assert {s.stack.path.split("/")[0] for s in task.table.values() if s.stack} == {"layers_0to1"}
    batch = {"tokens": jax.random.randint(jax.random.key(0), task.batch["tokens"].shape, 0, 256)}
    step = jax.jit(step)
    for _ in range(3):
        before, (state, _) = state, step(state, batch)
    masks = lambda s: dict(jax.tree_util.tree_leaves_with_path(s.frozen))
    assert len(masks(state)) == 2
    for path, new in masks(state).items():
        old = masks(before)[path]
        assert new.shape[0] == 2 and (new != old).any((1, 2)).all()
        np.testing.assert_array_equal(new.sum((1, 2)), old.sum((1, 2)))

    loss = lambda variables: task.loss(task.model, variables, batch, jax.random.key(0), True)[0]
    variables, rule = variables_of(state), rule_for(config, task.table)
    some, every = (
        jax.jit(lambda v, table=table: dense_gradients(loss, v, table))(variables)
        for table in (wanted_sites(rule, task.table), task.table)
    )
    assert set(some) == {"layers_0to1/mlp/up", "layers_0to1/mlp/down"} < set(every)
    for path, gradient in some.items():
        np.testing.assert_allclose(gradient, every[path], rtol=1e-4, atol=1e-6 * float(jnp.abs(gradient).max()))
        assert float(jnp.abs(gradient).max()) > 0


def accuracy(method, seed, folder):
    config = default("digits")
    config.update(steps=400, batch=64, seed=seed, log_every=400)
    config.model.width = 64
    config.optim.weight_decay = 0.0
    config.checkpoint.every = 400
    config.structure = rules_text(validate(config).table, 0.04, "erk", ("linear", "head"))
    config.method = method
    return loop.train(config, folder / f"{method or 'static'}{seed}").metrics["heldout"]["accuracy"]


@pytest.mark.long
def test_rigl_beats_a_fixed_support(tmp_path):
    """A perceptron on the digits that keeps 4 % of its weights. More seeds and SET are in the table rigl."""
    static, rigl = (accuracy(method, 0, tmp_path) for method in ("", "rigl(every=25)"))
    assert static + 0.05 < rigl and rigl > 0.8, (static, rigl)


@pytest.mark.long
def test_training_in_full_keeps_every_size():
    config = small_digits(structure=MASKED, method="set(every=1)")
    task, state, step = stepper(config)
    source = task.load()
    batches = jax.tree.map(lambda *a: jnp.stack(a), *[source.batch(i, None) for i in range(12)])
    end, masks = jax.jit(lambda s: jax.lax.scan(lambda s, b: (new := step(s, b)[0], new.frozen), s, batches))(state)
    masks = np.asarray(masks["layers_0"]["mask"])
    assert np.all(masks.sum((1, 2)) == 256)
    changes = (masks[1:] != masks[:-1]).sum((1, 2))
    assert np.all(changes[:8] > 0) and np.all(changes[8:] == 0)
    np.testing.assert_array_equal(end.frozen["layers_0"]["mask"], masks[-1])
