"""Options of a run: bf16 compute, rematerialisation, and what happens on which step."""

import contextlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models.decode import generate
from structmat.parallel import make_mesh, on_mesh, shard_batch
from structmat.training import loop
from structmat.training.build import compile_step, optimizer_for
from structmat.training.config import default, validate
from structmat.training.load import load_run
from structmat.training.metrics import read_metrics
from structmat.training.state import abstract_variables, create_state, initial_state, plan_state
from structmat.training.step import make_step
from structmat.training.tasks import digits
from tests.marks import mostly_long
from tests.training.small_runs import small_digits, write_corpus

MODELS = [("lm", "gpt"), ("lm", "llama"), ("images", "vit")]


def small(task, model, **fields):
    """One or two layers of width 16 of any transformer."""
    config = default(task, model)
    config.update(steps=12, batch=8, log_every=1)
    config.model.update(layers=2, width=16, heads=2)
    config.mup.base_width = 16
    config.eval.batches = 2
    if task == "lm":
        config.model.context = 16
    if model == "llama":
        config.model.update(kv_heads=1, hidden=24)
    config.update(fields)
    return config


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(("task", "model"), mostly_long(MODELS, MODELS[1:2]))
def test_bf16_computes_products_and_keeps_f32_weights_moments_and_loss(task, model):
    config = small(task, model, structure="low_rank(rank=2) + random_sparse(density=0.1)")
    config.model.dtype = "bfloat16"
    built = validate(config, devices=1)
    tx, schedule = optimizer_for(config, built)
    state = jax.eval_shape(lambda: initial_state(built, tx, None, jax.random.key(0)))
    step = make_step(built, tx, None, schedule, 0)
    after, metrics = jax.eval_shape(step, state, dict(built.batch))
    kept = {leaf.dtype.name for leaf in jax.tree.leaves((after.params, after.opt_state))}
    assert kept == {"float32", "int32"} and {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.frozen)} == {"int32"}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    assert jax.eval_shape(built.model.apply, abstract_variables(built), *built.example).dtype == jnp.float32
    products = [
        e for e in equations(jax.make_jaxpr(step)(state, dict(built.batch)).jaxpr) if e.primitive.name == "dot_general"
    ]
    halves = [all(v.aval.dtype == jnp.bfloat16 for v in e.invars) for e in products]
    assert len(products) > 20 and np.mean(halves) > 0.8  # softmax and its gradient stay f32


@pytest.mark.parametrize(("task", "model"), mostly_long(MODELS, MODELS[1:2]))
def test_remat_keeps_fewer_activations(task, model):
    config, kept = small(task, model), {}
    for policy in ("none", "dots", "full"):
        config.model.remat = policy
        built = validate(config, devices=1)
        tx, key = optimizer_for(config, built)[0], jax.random.key(0)
        variables = jax.eval_shape(partial(initial_state, built, tx, None), key).params

        def residuals(params, batch):
            loss = lambda p: built.loss(built.model, {"params": p}, batch, None, False)[0]  # noqa: B023
            return jax.vjp(loss, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, variables, dict(built.batch)))
        kept[policy] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert kept["full"] < 0.9 * kept["dots"] < 0.9 * 0.9 * kept["none"]


def evaluated(folder):
    return [row["step"] for row in read_metrics(folder) if "heldout_loss" in row]


@pytest.mark.long
def test_only_the_chosen_steps_are_profiled_and_evaluated(tmp_path, monkeypatch):
    active, seen = [], []

    @contextlib.contextmanager
    def trace(folder):
        active.append(folder)
        yield
        active.clear()

    clean = digits.digits.digits_batch
    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(
        digits.digits,
        "digits_batch",
        lambda seed, step, *rest: seen.append((step, bool(active))) or clean(seed, step, *rest),
    )
    config = small_digits(steps=5, profile="1:3")
    config.eval.every = 2
    loop.train(config, tmp_path / "run")
    assert seen == [(0, False), (1, True), (2, True), (3, False), (4, False)]
    assert evaluated(tmp_path / "run") == [2, 4, 5]


@pytest.mark.long
@pytest.mark.parametrize(("every", "expected"), [(0, [5]), (5, [5]), (9, [5])])
def test_evaluation_follows_its_schedule_and_ends_the_run(tmp_path, every, expected):
    config = small_digits(steps=5)
    config.eval.every = every
    loop.train(config, tmp_path / "run")
    assert evaluated(tmp_path / "run") == expected


def losses(config, **mesh):
    """Of three steps on one batch, and the part of the state that the first device holds."""
    config.mesh.update(mesh)
    count = math.prod(mesh.values())
    built = validate(config, count)
    tx, schedule = optimizer_for(config, built)
    grid = make_mesh(mesh, jax.devices()[:count])
    with on_mesh(grid):
        template = plan_state(built, tx, None, grid)
        state = create_state(built, tx, None, template, 0)
        compiled = compile_step(built, make_step(built, tx, None, schedule, 0), template, grid)
    rng, found = np.random.default_rng(0), []
    batch = {name: rng.integers(0, 10, s.shape).astype(s.dtype) for name, s in built.batch.items()}
    for _ in range(3):
        state, metrics = compiled(state, shard_batch(grid, batch))
        found.append(float(metrics["loss"]))
    return np.array(found), sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.long
@pytest.mark.parametrize(("task", "model"), MODELS[1:])
def test_a_mesh_gives_the_losses_of_one_device(task, model):
    """Among them a tensor axis that has to cut the one key-value head."""
    config = small(task, model, structure="layers_.*/mlp/.* -> monarch(blocks=2, order='blocked')", accumulate=2)
    config.optim.update(lr=0.02, warmup=1.0)
    config.model.layers = 1
    alone, whole = losses(config, data=1, fsdp=1, tensor=1)
    spread, part = losses(config, data=2, fsdp=2, tensor=2)
    assert alone[2] < alone[0] and part < 0.5 * whole
    np.testing.assert_allclose(spread, alone, rtol=3e-6)


@pytest.mark.long
def test_llama_trains_with_every_option_and_is_sampled(tmp_path):
    config = small("lm", "llama", structure="fit(low_rank(), params=0.6)", steps=60, batch=16, accumulate=2)
    config.model.update(dtype="bfloat16", remat="dots", vocab=300)
    config.data.root = str(write_corpus(tmp_path / "text"))
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.optim.lr = 0.02
    config.profile = "2:4"
    record = loop.train(config, tmp_path / "run")
    assert record.metrics["heldout"]["bits_per_token"] < 4.5
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    run = load_run(tmp_path / "run")
    prompt = jnp.asarray([list(b"the qui")], jnp.int32)
    new = generate(run.task.model, run.variables, prompt, 9, jax.random.key(0), 0.0)
    assert new.shape == (1, 9) and int(new.max()) < 256
    assert set(run.variables["params"]) == {"embed", "head", "layers_0to1", "norm"}
