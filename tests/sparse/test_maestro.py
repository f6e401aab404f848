"""Maestro: the order of truncations, the lasso, what shrinking takes away, and what training linear maps comes to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.nn import Site
from structmat.nn.sites import Stack
from structmat.sparse.maestro import Maestro, draw, find_ordered
from structmat.structures import StructureError, parse
from structmat.training import loop
from structmat.training.build import optimizer_for, step_for
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.methods import hook
from structmat.training.state import TrainState, initial_state, variables_of
from tests.training.small_runs import small_digits, small_lm, write_corpus
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401  a fixture

ORDERED = parse("ordered()")
SITES = {
    "x_0/w": Site(ORDERED.bind(6, 8), "linear", Stack("x_0to1/w", 0, 2)),
    "x_1/w": Site(ORDERED.bind(6, 8), "linear", Stack("x_0to1/w", 1, 2)),
    "y": Site(parse("ordered(rank=4)").bind(5, 7), "linear"),
    "z": Site(parse("dense()").bind(5, 7), "linear"),
}
WIDTHS = [6, 3, 2]
"""Kept by the three layers, of 6, 6 and 4."""


def variables(seed=0):
    """Of SITES: components past the widths are zero."""
    rng, width = np.random.default_rng(seed), np.array(WIDTHS, np.int32)
    acts = [np.arange(6) < width[:2, None], np.arange(4) < width[2]]
    drawn = lambda mask, d: np.where(mask[..., None], rng.normal(size=(*mask.shape, d)), 0).astype(np.float32)
    params = {
        "x_0to1": {"w": {"a": drawn(acts[0], 6), "b": drawn(acts[0], 8)}},
        "y": {"a": drawn(acts[1], 5), "b": drawn(acts[1], 7), "bias": np.ones(7, np.float32)},
        "z": {"kernel": np.ones((5, 7), np.float32)},
    }
    return {"params": params, "frozen": {"x_0to1": {"w": {"width": width[:2]}}, "y": {"width": width[2]}}}


def test_every_truncation_comes_once_in_a_period():
    ranks, widths = [4, 2, 5], jnp.array([3, 1, 5], jnp.int32)
    period = int(widths.sum())
    steps = jax.jit(jax.vmap(lambda step, seed: draw(seed, step, widths, ranks), (0, None)))
    pairs = np.stack(jax.device_get(steps(np.arange(4 * period), 0)), axis=1)
    each = {(layer, k) for layer, width in enumerate(widths) for k in range(1, width + 1)}
    orders = [[tuple(pair) for pair in part.tolist()] for part in pairs.reshape(4, period, 2)]
    assert all(set(order) == each for order in orders) and len({tuple(order) for order in orders}) == 4
    assert not np.array_equal(pairs, np.stack(steps(np.arange(4 * period), 1), axis=1))


def test_the_loss_sees_one_layer_truncated():
    frozen, view = variables()["frozen"], Maestro(seed=3).view(SITES, 100)
    seen = jax.jit(jax.vmap(lambda step: view(frozen, jax.random.key(step), step)))(np.arange(2 * sum(WIDTHS)))
    found = np.concatenate([seen["x_0to1"]["w"]["width"], seen["y"]["width"][:, None]], axis=1)
    assert np.all((found != WIDTHS).sum(axis=1) <= 1) and np.all(found <= WIDTHS) and found.min() == 1
    # A step on which a layer is truncated to all it has looks like one without: three of every period.
    assert np.sum(np.all(found == WIDTHS, axis=1)) == 2 * 3


def test_the_penalty_is_the_double_loop_and_its_gradient_finite():
    held, penalty = variables(), Maestro(lasso=0.5).penalty(SITES, 100)
    value, grads = jax.jit(jax.value_and_grad(lambda p: penalty({**held, "params": p}, 0)))(held["params"])
    x, y = held["params"]["x_0to1"]["w"], held["params"]["y"]
    factors = [*x["a"], *x["b"], y["a"], y["b"]]
    want = sum(np.linalg.norm(factor[i:]) for factor in factors for i in range(len(factor)))
    assert float(value) == pytest.approx(0.5 * want, rel=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert np.any(grads["y"]["a"][:2]) and not np.any(grads["y"]["a"][2:]) and not np.any(grads["z"]["kernel"])
    assert Maestro(lasso=0.0).penalty(SITES, 100) is None


def shrunk(method, step, steps=40, scales=(1e-3, 1e-4)):
    """(state before, after the rule at `step`), the last components of the first two layers made small."""
    held = variables()
    held["params"]["x_0to1"]["w"]["b"][0, 2:] *= scales[0]
    held["params"]["x_0to1"]["w"]["a"][1] *= scales[1]
    opt_state = jax.tree.map(lambda leaf: leaf + 1, optax.adam(1e-3).init(held["params"]))
    state = TrainState(np.int32(step), **held, opt_state=opt_state, rule_state={}, skips=np.zeros(2, np.int32))
    rule = method.rule(SITES, steps)
    return state, jax.device_get(jax.jit(rule.update)(jax.random.key(0), np.int32(step), {}, state))


def test_shrinking_takes_away_what_is_not_needed_and_all_that_belongs_to_it():
    before, after = shrunk(Maestro(every=10, threshold=0.1), 10)
    widths = [2, 1, 2]  # small from the third on; small everywhere; kept, and never grown
    assert [*after.frozen["x_0to1"]["w"]["width"], after.frozen["y"]["width"]] == widths
    for tree, old in ((after.params, before.params), (after.opt_state[0].mu, before.opt_state[0].mu)):
        for name in ("a", "b"):
            for layer in range(2):
                new = tree["x_0to1"]["w"][name][layer]
                np.testing.assert_array_equal(new[: widths[layer]], old["x_0to1"]["w"][name][layer][: widths[layer]])
                assert not new[widths[layer] :].any()
            np.testing.assert_array_equal(tree["y"][name][:2], old["y"][name][:2])
            assert not tree["y"][name][2:].any()
        np.testing.assert_array_equal(tree["z"]["kernel"], old["z"]["kernel"])
        np.testing.assert_array_equal(tree["y"]["bias"], old["y"]["bias"])
    report = Maestro().report(SITES, {"params": after.params, "frozen": after.frozen})
    assert report["ranks"] == {"x_0/w": 2, "x_1/w": 1, "y": 2}
    assert report["params"] == {"x_0/w": 28, "x_1/w": 14, "y": 24} and report["site_params"] == 66
    assert report["dense_site_params"] == 48 + 48 + 35


def test_a_budget_is_kept_after_the_last_step_alone():
    method = Maestro(every=10, threshold=0.0, keep=0.5)
    _, early = shrunk(method, 10)
    assert [*early.frozen["x_0to1"]["w"]["width"], early.frozen["y"]["width"]] == WIDTHS
    _, late = shrunk(method, 40)
    left = method.report(SITES, {"params": late.params, "frozen": late.frozen})
    assert 0.5 * 131 - 14 < left["site_params"] <= 0.5 * 131
    assert left["ranks"] == {"x_0/w": 2, "x_1/w": 1, "y": 1}
    rule = method.rule(SITES, 45)
    assert [step for step in range(1, 46) if rule.due(jnp.int32(step))] == [10, 20, 30, 40, 45]


@pytest.mark.parametrize(
    ("method", "structure", "message"),
    [
        ("maestro(every=0)", "ordered()", "every must be at least 1"),
        ("maestro(lasso=-1.0)", "ordered()", "lasso must not be negative, got -1.0"),
        ("maestro(keep=1.5)", "ordered()", r"keep must be in \(0, 1\], got 1.5"),
        ("maestro(keep=0.01)", "ordered()", "keep=0.01 does not fit: one component of every site takes 80 numbers"),
        ("maestro()", "low_rank(rank=2)", r"are structure='ordered\(\)', and this model has none"),
    ],
)
def test_refused(method, structure, message):
    with pytest.raises(ConfigError, match=message):
        validate(small_digits(method=method, structure=structure))


def test_no_ordered_site_is_refused_by_name():
    with pytest.raises(StructureError, match=r"its structures: dense\(\)$"):
        find_ordered({"z": SITES["z"]})


def trained(x, y, rate, steps):
    """A linear map by gradient descent on one truncation after another: its arrays."""
    bound = ORDERED.bind(x.shape[1], y.shape[1])
    view = Maestro().view({"w": Site(bound, "linear")}, steps)

    def loss(params, width):
        return jnp.mean(jnp.square(bound.matmul({**params, "width": width}, x) - y)) * y.shape[1]

    def step(params, number):
        width = view({"w": {"width": params["width"]}}, jax.random.key(0), number)["w"]["width"]
        free = {name: params[name] for name in ("a", "b")}
        return {**params, **jax.tree.map(lambda p, g: p - rate * g, free, jax.grad(loss)(free, width))}, None

    train = jax.jit(lambda key: jax.lax.scan(step, bound.init(key), jnp.arange(steps))[0])
    return jax.device_get(train(jax.random.key(1)))


def test_every_truncation_of_a_linear_map_comes_to_the_best_of_its_rank():
    """The paper's theorem, at the setting of the notebook in its code: a teacher of rank 3, inputs I."""
    rng = np.random.default_rng(0)
    teacher = (rng.normal(size=(9, 3)) * [1.5, 1.0, 0.6] @ rng.normal(size=(3, 6))).astype(np.float32)
    found = trained(np.eye(9, dtype=np.float32), teacher, 0.1, 6000)
    u, s, vt = np.linalg.svd(teacher, full_matrices=False)
    for k in range(1, 7):
        best = (u[:, :k] * s[:k]) @ vt[:k]
        np.testing.assert_allclose(found["a"][:k].T @ found["b"][:k], best, atol=2e-3 * s[0], err_msg=str(k))
    sizes = np.linalg.norm(found["a"], axis=1) * np.linalg.norm(found["b"], axis=1)
    np.testing.assert_allclose(sizes, s, atol=1e-2 * s[0])  # those of the components not needed fall slowly


@pytest.mark.long
def test_a_linear_autoencoder_comes_to_the_principal_components():
    """Three points of ten dimensions: the data's covariance is not isotropic, yet every truncation projects best."""
    data = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32) * [[2.0], [1.2], [0.7]]
    data = data.astype(np.float32)
    found = trained(data, data, 0.02, 40000)
    _, _, vt = np.linalg.svd(data, full_matrices=False)
    for k in range(1, 4):
        want = data @ vt[:k].T @ vt[:k]
        np.testing.assert_allclose(data @ found["a"][:k].T @ found["b"][:k], want, atol=0.02)


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_truncations_and_widths(tmp_path):
    """In scanned layers; the record has the ranks."""
    corpus = write_corpus(tmp_path / "corpus")
    config = small_lm(corpus, structure="ordered()", method="maestro(every=3, lasso=0.1, threshold=0.2)")
    config.model.layers = 2
    record = loop.train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "parts", on_step=kill_at(8))
    loop.train(config, tmp_path / "parts")
    sums = array_sums(tmp_path / "whole")
    assert array_sums(tmp_path / "parts") == sums and "frozen/layers_0to1/mlp/up/width" in sums
    report = record.metrics["method_report"]
    assert len(report["ranks"]) == 12 and min(report["ranks"].values()) < 16
    assert report["site_params"] == sum(report["params"].values()) <= record.metrics["dense_site_params"]


@pytest.mark.long
def test_with_the_full_pass_the_whole_learns_and_the_truncated_learns_from_it():
    """Loss and gradients of a step against two calls of the model by hand; evaluation is of the whole alone."""
    config = small_digits(structure="ordered()", method="maestro(every=4, lasso=0.0, full_pass=True)")
    task = validate(config, devices=1)
    tx, schedule = optimizer_for(config, task)
    state = jax.jit(lambda: initial_state(task, tx, None, jax.random.key(0)))()
    rng = np.random.default_rng(0)  # the head starts at zero, where every softmax is the same
    state = state.replace(params=jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), state.params))
    batch = task.load().batch(0, None)
    step = step_for(config, task, tx, None, schedule)
    _, metrics = jax.jit(step)(state, batch)
    view = hook(config, "view", task.table)
    frozen = view(state.frozen, jax.random.key(0), 0)
    assert not np.array_equal(jax.tree.leaves(frozen), jax.tree.leaves(state.frozen))

    def losses(params, fixed):
        call = lambda params, frozen: task.model.apply({"params": params, "frozen": frozen}, batch["images"])
        whole = optax.softmax_cross_entropy_with_integer_labels(call(params, state.frozen), batch["labels"]).mean()
        target = jax.nn.softmax(call(fixed, state.frozen))
        return whole, -(target * jax.nn.log_softmax(call(params, frozen))).sum(-1).mean()

    both = jax.jit(lambda p: losses(p, state.params))(state.params)
    np.testing.assert_allclose([metrics["loss"], metrics["viewed"]], both, rtol=1e-5)
    grads = jax.jit(jax.grad(lambda p: sum(losses(p, state.params))))(state.params)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.global_norm(grads)), rel=1e-4)
    once = dataclasses.replace(task, full_pass=False)
    assert task.step_flops() == 2 * once.step_flops()
    assert set(task.loss(task.model, variables_of(state), batch, None, False)[1]) == {"loss", "accuracy", "count"}


def test_the_full_pass_needs_logits():
    config = default("teacher")
    config.update(structure="ordered()", method="maestro(full_pass=True)")
    with pytest.raises(ConfigError, match="compares the logits of two models"):
        validate(config, devices=1)
