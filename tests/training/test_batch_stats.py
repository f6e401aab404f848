"""Running statistics of batch normalisation: trained with, evaluated by, kept in every checkpoint, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.evaluate import evaluated
from structmat.exchange import load_safetensors, save_run
from structmat.parallel import make_mesh, on_mesh, shard_batch
from structmat.training import loop
from structmat.training.build import compile_step, evaluate, make_eval_step, optimizer_for
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from structmat.training.recalibrate import recalibrated
from structmat.training.state import create_state, initial_state, plan_state, variables_of
from structmat.training.step import make_step
from structmat.training.tasks.classification import loss


def small(**fields):
    config = default("images", "resnet_v1")
    config.update(steps=6, batch=32, log_every=1)
    config.model.update(depth=8, width=4)
    config.optim.update(name="sgd", lr=0.05, schedule="steps", warmup=0.0, weight_decay=1e-4, clip=0.0)
    config.mup.enabled = False
    config.eval.batches = 2
    config.checkpoint.every = 2
    config.update(fields)
    return config


def started(config):
    task = validate(config)
    tx, schedule = optimizer_for(config, task)
    state = jax.jit(lambda: initial_state(task, tx, None, jax.random.key(0)))()
    return task, state, jax.jit(make_step(task, tx, None, schedule, 0)), task.load()


def heldout_loss(task, variables):
    apply, batches = jax.jit(task.model.apply), list(task.load().heldout())
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(apply(variables, b["images"]), b["labels"]) for b in batches
    ]
    return float(jnp.concatenate(losses).mean())


def test_a_step_moves_them_towards_the_batch_and_evaluation_reads_them():
    task, state, step, source = started(small())
    batch = source.batch(0, None)
    call = lambda s, train: task.model.apply(variables_of(s), batch["images"], train, mutable=["batch_stats"])
    new, metrics = step(state, batch)
    expected = call(state, True)[1]["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.batch_stats, expected)
    assert "batch_stats" not in metrics and all(m.ndim == 0 for name, m in metrics.items() if name != "bad")
    mesh = make_mesh({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1})
    with on_mesh(mesh):
        found = evaluate(make_eval_step(task, mesh), new, source, mesh)
    assert found["loss"] == pytest.approx(heldout_loss(task, variables_of(new)), rel=1e-5)


def test_a_step_that_is_skipped_leaves_them():
    _, state, step, source = started(small())
    batch = source.batch(0, None)
    batch["images"] = np.full_like(batch["images"], np.nan)
    new, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, state.batch_stats)


@pytest.mark.long
def test_parts_of_a_batch_give_the_mean_of_theirs():
    _, state, step, source = started(small(accumulate=2))
    task, *_ = started(small())
    batch = source.batch(0, None)
    new, _ = step(state, batch)
    parts = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
    each = [
        task.model.apply(variables_of(state), part["images"], True, mutable=["batch_stats"])[1]["batch_stats"]
        for part in parts
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new.batch_stats, mean)


@pytest.mark.long
def test_they_are_those_of_the_whole_batch_on_any_mesh():
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = small()
        config.mesh.update(data=shape[0], fsdp=shape[1], tensor=shape[2])
        mesh = make_mesh(config.mesh.to_dict(), jax.devices()[: int(np.prod(shape))])
        task = validate(config, devices=int(np.prod(shape)))
        tx, schedule = optimizer_for(config, task)
        with on_mesh(mesh):
            template = plan_state(task, tx, None, mesh)
            state = create_state(task, tx, None, template, 0)
            step = compile_step(task, make_step(task, tx, None, schedule, 0), template, mesh)
            state, metrics = step(state, shard_batch(mesh, task.load().batch(0, None)))
            found.append(jax.device_get((state.batch_stats, state.params, metrics["loss"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), *found)


@pytest.mark.long
def test_a_run_keeps_them(tmp_path):
    whole = loop.train(small(), tmp_path / "whole")
    run = load_run(tmp_path / "whole")
    leaves = jax.tree.leaves(run.variables["batch_stats"])
    assert leaves and all(np.isfinite(leaf).all() for leaf in leaves) and np.any(np.abs(leaves[0]) > 1e-3)
    assert heldout_loss(run.task, run.variables) == pytest.approx(whole.metrics["heldout"]["loss"], rel=1e-5)
    assert evaluated(run, run.config, "again").metrics["heldout"] == pytest.approx(whole.metrics["heldout"], rel=1e-5)
    save_run(tmp_path / "whole", tmp_path / "saved")
    back = load_safetensors(tmp_path / "saved", like=jax.eval_shape(lambda: run.variables)).variables
    jax.tree.map(np.testing.assert_array_equal, back, run.variables)


@pytest.mark.long
def test_a_switch_and_a_teacher_keep_them(tmp_path):
    config = small(switch="0.5: layers_.*/conv./conv -> low_rank(rank=2)", method="distill(features=0.0)")
    record = loop.train(config, tmp_path / "run")
    assert np.isfinite(record.metrics["heldout"]["loss"])
    assert any(
        np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(load_run(tmp_path / "run").variables["batch_stats"])
    )


def test_smoothing_spreads_training_labels_alone():
    class Logits:
        def apply(self, variables, inputs, train, **rest):
            return (inputs, {}) if train else inputs

    logits, labels = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6) % 5
    batch = {"images": jnp.asarray(logits), "labels": jnp.asarray(labels)}
    for train, smoothing in ((True, 0.1), (True, 0.0), (False, 0.1)):
        own = smoothing if train else 0.0
        target = (1 - own) * np.eye(5)[labels] + own / 5
        theirs = -(target * np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))).sum(-1).mean()
        found, _ = loss(Logits(), {}, batch, jax.random.key(0), train, smoothing=smoothing)
        assert float(found) == pytest.approx(float(theirs), rel=1e-5)


def test_recalibrated_they_are_the_means_over_batches_and_the_rest_stays():
    task, state, step, source = started(small())
    state, _ = step(state, source.batch(0, None))
    batches = [source.batch(i, None) for i in (3, 4, 5)]
    new = recalibrated(task, state, batches)
    begun = variables_of(state) | {"batch_stats": jax.tree.map(jnp.zeros_like, state.batch_stats)}
    call = jax.jit(lambda images: task.model.apply(begun, images, True, mutable=["batch_stats"])[1]["batch_stats"])
    each = [call(batch["images"]) for batch in batches]
    mean = jax.tree.map(lambda *a: sum(a) / 0.1 / 3, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new.batch_stats, mean)
    jax.tree.map(np.testing.assert_array_equal, new.replace(batch_stats=state.batch_stats), state)
    stem = np.asarray(task.model.apply(variables_of(state), batches[0]["images"], capture_intermediates=True, mutable=True)[1]
                      ["intermediates"]["stem"]["conv"]["__call__"][0])  # fmt: skip
    only = recalibrated(task, state, batches[:1]).batch_stats["stem"]["norm"]
    np.testing.assert_allclose(only["var"], stem.var((0, 1, 2)), rtol=1e-3)


@pytest.mark.long
def test_a_cut_after_the_last_step_is_evaluated_with_statistics_of_its_own(tmp_path):
    config = small(switch="end: layers_.*/conv./conv -> low_rank(rank=1)")
    plain = loop.train(config, tmp_path / "plain").metrics
    config.eval.recalibrate = 4
    again = loop.train(config, tmp_path / "again").metrics
    assert again["heldout"]["loss"] != plain["heldout"]["loss"]
    run = load_run(tmp_path / "again")
    assert heldout_loss(run.task, run.variables) == pytest.approx(again["heldout"]["loss"], rel=1e-5)
    with pytest.raises(
        ConfigError, match=r"eval\.recalibrate = 2: this model has no batch normalisation.*resnet_v1, vgg"
    ):
        config = default("images")
        config.eval.recalibrate = 2
        validate(config)
