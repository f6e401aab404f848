"""One step: what is differentiated, what is skipped, what a rule sees."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.nn import site_params
from structmat.parallel import make_mesh, on_mesh, unbox
from structmat.training.build import optimizer_for
from structmat.training.config import validate
from structmat.training.rule import dense_gradient_of, dense_gradients
from structmat.training.state import abstract_variables, create_state, initial_state, plan_state
from structmat.training.step import leaf_paths, make_step
from structmat.training.task import Task
from tests.training.small_runs import small_digits, small_lm


def constant(value):
    return lambda count: value


@pytest.fixture(scope="module")
def digits_run():
    """(task, tx, schedule, state, jitted step) of an adapter-like model: frozen dense plus low rank."""
    config = small_digits(structure="frozen(dense()) + low_rank(rank=2)")
    config.optim.lr = 0.03
    task = validate(config)
    tx, schedule = optimizer_for(config, task)
    state = jax.jit(lambda: initial_state(task, tx, None, jax.random.key(0)))()
    return task, tx, schedule, state, jax.jit(make_step(task, tx, None, schedule, 0))


def batches(task, count):
    source = task.load()
    return [source.batch(step, None) for step in range(count)]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_loss_falls_and_frozen_leaves_stay(digits_run):
    task, _, schedule, state, step = digits_run
    losses, start = [], state
    for batch in batches(task, 12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert float(metrics["lr"]) == pytest.approx(float(schedule(int(state.step) - 1)))
    assert losses[-1] < 0.9 * losses[0]
    assert bits(state.frozen) == bits(start.frozen) and jax.tree.leaves(state.frozen)
    assert all(a != b for a, b in zip(bits(state.params), bits(start.params)))
    assert int(state.step) == 12 and not state.skips.any()
    frozen = {leaf.shape for leaf in jax.tree.leaves(start.frozen)}
    assert not frozen & {leaf.shape for leaf in jax.tree.leaves(start.opt_state)}


def test_non_finite_step_changes_only_the_counters(digits_run):
    task, _, _, state, step = digits_run
    good, *_ = batches(task, 1)
    state, _ = step(state, good)
    bad = good | {"images": np.where(np.arange(64) == 3, np.nan, good["images"]).astype(np.float32)}
    after, metrics = step(state, bad)
    assert not np.isfinite(float(metrics["loss"])) and metrics["bad"].any()
    for part in ("params", "opt_state", "frozen"):
        assert bits(getattr(after, part)) == bits(getattr(state, part))
    assert int(after.step) == int(state.step) + 1 and after.skips.tolist() == [1, 1]
    after, _ = step(after, bad)
    assert after.skips.tolist() == [2, 2]
    after, _ = step(after, good)
    assert after.skips.tolist() == [0, 2] and bits(after.params) != bits(state.params)


def test_a_single_bad_gradient_is_found_by_name(digits_run):
    task, tx, schedule, state, _ = digits_run
    zero = lambda w: 0 * jnp.sqrt(jnp.abs(w - jax.lax.stop_gradient(w))).sum()  # its gradient is 0 * inf

    def loss(model, variables, batch, rng, train):
        value, metrics = task.loss(model, variables, batch, rng, train)
        return value + zero(variables["params"]["layers_0"]["1"]["b"]), metrics

    step = jax.jit(make_step(dataclasses.replace(task, loss=loss), tx, None, schedule, 0))
    after, metrics = step(state, batches(task, 1)[0])
    paths = leaf_paths(state.params)
    assert [path for path, bad in zip(paths, metrics["bad"]) if bad] == ["layers_0/1/b"]
    assert np.isfinite(float(metrics["loss"])) and after.skips.tolist() == [1, 1]


def test_a_single_bad_weight_is_found_by_name(digits_run):
    task, _, _, state, step = digits_run
    leaves, tree = jax.tree.flatten(state.params)
    leaves[-1] = leaves[-1].at[0].set(np.nan)
    _, metrics = step(state.replace(params=jax.tree.unflatten(tree, leaves)), batches(task, 1)[0])
    paths = leaf_paths(state.params)
    assert metrics["skipped"] == 1
    assert [path for path, bad in zip(paths, metrics["bad"]) if bad] == paths[-1:] != paths[:1]


class Spiral(nn.Module):
    """One complex parameter."""

    @nn.compact
    def __call__(self, x):
        return self.param("z", lambda key: jnp.asarray([1.0 + 2.0j, -0.5j], jnp.complex64)) * x


def test_complex_gradients_descend():
    def loss(model, variables, batch, rng, train):
        value = jnp.abs(model.apply(variables, batch["x"]) - jnp.asarray([2j, 1 - 1j])) ** 2
        return value.mean(), {"loss": value.mean(), "count": jnp.float32(2)}

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    task = Task("spiral", Spiral(), Spiral(), (shape,), {"x": shape}, loss, "loss", "row", 2, 0, None)
    tx = optax.sgd(0.1)
    state, step = initial_state(task, tx, None, jax.random.key(0)), jax.jit(make_step(task, tx, None, constant(0.1), 0))
    for _ in range(60):
        state, metrics = step(state, {"x": jnp.ones(2)})
    assert float(metrics["loss"]) < 1e-4


@pytest.fixture(scope="module")
def lm_params(tmp_path_factory):
    config = small_lm(tmp_path_factory.mktemp("unread"), structure="low_rank(rank=4)")
    config.model.layers = 2
    config.model.tie = True
    task = validate(config)
    shapes = unbox(abstract_variables(task))["params"]
    rng = np.random.default_rng(0)
    return task, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def test_dense_gradients_pull_back_to_the_gradients_of_the_factors(lm_params):
    task, params = lm_params
    tokens = jax.random.randint(jax.random.key(0), (8, 17), 0, 256)
    loss = lambda variables: task.loss(task.model, variables, {"tokens": tokens}, None, False)[0]
    dense, factors = jax.jit(
        lambda p: (dense_gradients(loss, {"params": p}, task.table), jax.grad(lambda q: loss({"params": q}))(p))
    )(params)
    assert any(site.stack for site in task.table.values())
    for path, site in task.table.items():
        own = site_params({"params": params}, path, site)
        expected = site_params({"params": factors}, path, site)
        gradient = dense_gradient_of(path, site, dense)
        assert gradient.shape == (site.bound.d_in, site.bound.d_out)
        _, pull = jax.vjp(site.bound.materialize, own)
        for name, value in pull(gradient)[0].items():
            scale = float(jnp.abs(expected[name]).max())
            assert scale > 0
            np.testing.assert_allclose(value, expected[name], atol=2e-5 * scale, err_msg=path)


@dataclasses.dataclass(frozen=True)
class Ball:
    """Every `every` steps, scale parameters into a ball; add up random draws and the dense gradients seen."""

    every: int = 3
    radius: float = 2.0
    needs_dense_gradients: bool = True

    def init(self, sites, state):
        shapes = {p: (s.bound.d_in, s.bound.d_out) for p, s in sites.items()}
        return {
            "last": jnp.zeros((), jnp.int32),
            "draw": jnp.zeros(()),
            "seen": {p.replace("/", "."): jnp.zeros(shape) for p, shape in shapes.items()},
        }

    def due(self, step):
        return step % self.every == 0

    def update(self, key, step, dense_grads, state):
        shrink = lambda leaf: leaf * jnp.minimum(1, self.radius / (jnp.linalg.norm(leaf) + 1e-9))
        old = state.rule_state
        seen = {name.replace("/", "."): jnp.abs(g) for name, g in dense_grads.items()}
        draw = old["draw"] + jax.random.uniform(key)
        kept = {"last": step, "draw": draw, "seen": jax.tree.map(jnp.add, old["seen"], seen)}
        return state.replace(params=jax.tree.map(shrink, state.params), rule_state=kept)


def test_rule_acts_after_the_optimiser_only_when_due_and_never_on_a_skipped_step(digits_run):
    task, tx, schedule, _, _ = digits_run
    rule = Ball(every=2, radius=0.05)
    step = jax.jit(make_step(task, tx, rule, schedule, 0))
    state = initial_state(task, tx, rule, jax.random.key(0))
    norms = lambda s: max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(s.params))
    one, two, three, four = batches(task, 4)
    state, _ = step(state, one)
    assert norms(state) > 0.1 and int(state.rule_state["last"]) == 0
    state, _ = step(state, two)
    assert norms(state) <= 0.05 + 1e-6 and int(state.rule_state["last"]) == 2
    assert all(bool(seen.any()) for seen in state.rule_state["seen"].values())
    draw = float(state.rule_state["draw"])
    state, _ = step(state, three)
    state, _ = step(state, four | {"images": np.full_like(four["images"], np.inf)})
    assert int(state.step) == 4 and int(state.rule_state["last"]) == 2 and float(state.rule_state["draw"]) == draw


def test_every_leaf_of_the_state_is_laid_out_over_the_mesh():
    config = small_digits(structure="low_rank(rank=4)", mesh=dict(data=2, fsdp=2, tensor=2))
    config.model.layers = 2
    task = validate(config)
    tx, _ = optimizer_for(config, task)
    mesh = make_mesh(config.mesh.to_dict())
    with on_mesh(mesh):
        template = plan_state(task, tx, Ball(), mesh)
        state = create_state(task, tx, Ball(), template, 0)
    for leaf, planned in zip(jax.tree.leaves(state), jax.tree.leaves(template)):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)
        assert len(leaf.sharding.device_set) == 8
    split = lambda leaf: any(axis is not None for axis in leaf.sharding.spec)
    assert any(map(split, jax.tree.leaves(template.params)))
    moments = [leaf for leaf in jax.tree.leaves(template.opt_state) if leaf.ndim]
    assert [split(m) for m in moments] == [split(p) for p in jax.tree.leaves(template.params)] * 2
    plain = jax.tree.leaves(jax.jit(lambda: initial_state(task, tx, Ball(), jax.random.key(0)))())
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), plain))
