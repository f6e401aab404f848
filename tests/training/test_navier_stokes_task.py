"""Flow on the torus as a task: its data, errors and sizes, what its models train, and that complex parameters resume."""

import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from structmat.nn import site_params, sites
from structmat.optim import multipliers
from structmat.parallel import make_mesh, on_mesh, shard_batch
from structmat.training import dry_run, loop
from structmat.training.build import compile_step, evaluate, make_eval_step, optimizer_for
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.metrics import read_metrics
from structmat.training.rule import dense_gradients
from structmat.training.state import create_state, plan_state
from structmat.training.step import gradients, make_step
from structmat.training.tasks import navier_stokes
from tests.marks import mostly_long
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401

TUCKER = ".*/spectral -> fit(tucker(), params=0.1)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pde")


def small(folder, model="fno", **fields):
    """Width 4 on 8 x 8 points, 12 samples, 5 held out."""
    config = default("navier_stokes", model)
    config.update(steps=12, batch=8, log_every=1)
    config.data.update(resolution=8, solve_resolution=16, time=0.5, dt=0.1, train=12, test=5, folder=str(folder))
    own = {"unet": dict(depth=1), "resnet": dict(blocks=1)}.get(model, dict(layers=1, modes=4))
    config.model.update(width=4, **own)
    config.mup.base_width = 4
    config.checkpoint.every = 5
    config.update(fields)
    return config


def drawn(task, seed=0):
    return nn.unbox(
        jax.jit(task.model.init)(jax.random.key(seed), *(jnp.zeros(e.shape, e.dtype) for e in task.example))
    )


def test_batches_are_scaled_samples_and_the_held_out_are_others(folder):
    config = small(folder)
    config.data.fine = 16
    task = validate(config)
    source = task.load()
    assert {n: (a.shape, a.dtype) for n, a in source.batch(3, None).items()} == {
        n: (s.shape, s.dtype) for n, s in task.batch.items()
    }
    rows = [source.batch(step, None) for step in range(3)]
    for name, array in rows[1].items():
        assert np.array_equal(array[2:5], source.batch(1, range(2, 5))[name])
        assert np.array_equal(array, source.batch(1, None)[name]) and not np.array_equal(array, rows[2][name])
    two_epochs = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for array in two_epochs.values():
        samples, times = np.unique(array.reshape(24, -1), axis=0, return_counts=True)
        assert len(samples) == 12 and (times == 2).all()
        assert np.mean(samples**2, dtype=np.float64) == pytest.approx(1, rel=1e-6)
    (test,) = source.heldout()
    assert test["x_fine"].shape == (8, 16, 16, 1) and np.array_equal(test["x_fine"][:, ::2, ::2], test["x"])
    assert np.array_equal(np.isnan(test["y_fine"]).all((1, 2)), [False] * 5 + [True] * 3)
    assert np.array_equal(test["y_fine"][:5, ::2, ::2], test["y"][:5])
    assert not {a.tobytes() for a in test["x"][:5]} & {a.tobytes() for a in two_epochs["x"]}
    assert source.sha256 == validate(small(folder)).load().sha256
    mean = two_epochs["y"].mean(0)
    off = [np.linalg.norm(mean - y) / np.linalg.norm(y) for y in test["y"][:5]]
    assert source.reference["mean_field"] == pytest.approx(np.mean(off), rel=1e-5)


def test_inputs_of_a_later_time_are_the_flow_there(folder):
    config = small(folder)
    config.data.update(start=0.2, time=0.6)
    later = validate(config).load()
    here = {}
    for time in (0.2, 0.6):
        config.data.update(start=0.0, time=time)
        here[time] = next(validate(config).load().heldout())["y"][:5]
    test = next(later.heldout())
    for name, time in (("x", 0.2), ("y", 0.6)):
        ratio = test[name][:5].reshape(5, 8, 8) / here[time]
        assert np.ptp(ratio) < 1e-4 * ratio.mean(), name  # but for the scale
    assert ", from time 0.2" in later.description
    config.data.update(start=0.2, time=0.6)
    ahead = navier_stokes.trajectories(config.data, 5, 8, 2)
    config.data.update(start=0.0, time=1.0)
    own = navier_stokes.trajectories(config.data, 5, 8)
    assert ahead.times == pytest.approx([0.6, 1.0])
    np.testing.assert_allclose(ahead.outputs[:, 1], own.outputs[:, 0], atol=1e-5)


def test_held_out_samples_stay_when_others_come(folder):
    config = small(folder)
    fewer = validate(config).load()
    config.data.train = 15
    more = validate(config).load()
    one, two = next(fewer.heldout()), next(more.heldout())
    assert np.ptp(two["x"][:5] / one["x"][:5]) < 1e-5  # but for the scale
    assert fewer.sha256 != more.sha256


def test_errors_are_means_over_fields_that_count():
    rng = np.random.default_rng(0)
    out, truth = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    k = 2 * np.pi * np.fft.fftfreq(8, 1 / 8)
    weight = np.sqrt(1 + k[:, None] ** 2 + k**2)
    h1 = [
        np.linalg.norm(weight * np.fft.fft2(o - t)) / np.linalg.norm(weight * np.fft.fft2(t))
        for o, t in zip(out, truth)
    ]
    l2 = [np.linalg.norm(o - t) / np.linalg.norm(t) for o, t in zip(out, truth)]
    truth[3] = np.nan
    errors, count = jax.jit(navier_stokes.mean_errors)(out[..., None], truth)
    assert float(count) == 3
    assert float(errors["l2"]) == pytest.approx(np.mean(l2[:3]), rel=1e-5)
    assert float(errors["h1"]) == pytest.approx(np.mean(h1[:3]), rel=1e-5)


class Same(nn.Module):
    """The guess that nothing changes."""

    def __call__(self, x, train=False):
        return x


def test_the_loss_takes_its_norm_and_another_grid():
    rng = np.random.default_rng(1)
    x, y, x_fine, y_fine = (rng.normal(size=(2, n, n)).astype(np.float32) for n in (4, 4, 8, 8))
    batch = {"x": x[..., None], "y": y, "x_fine": x_fine[..., None], "y_fine": y_fine}
    score = jax.jit(lambda norm, batch: navier_stokes.loss(norm, Same(), {}, batch, None, False), static_argnums=0)
    value, metrics = score("h1", batch)
    assert set(metrics) == {"loss", "l2", "h1", "l2_fine", "count"}
    assert float(value) == float(metrics["h1"]) == float(metrics["loss"]) != float(metrics["l2"])
    off = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(x_fine, y_fine)]
    assert float(metrics["l2_fine"]) == pytest.approx(np.mean(off), rel=1e-5)
    del batch["x_fine"], batch["y_fine"]
    value, metrics = score("l2", batch)
    assert float(value) == float(metrics["l2"]) and "l2_fine" not in metrics


def pointwise(width, channels):
    """Parameters, and FLOPs a point, of an FNO's layers at points, with one block."""
    pairs = [(channels, 2 * width), (2 * width, width), (width, width // 2), (width // 2, width), (width, 2 * width)]
    matrices = sum(a * b for a, b in [*pairs, (2 * width, 1)]) + width**2
    return matrices + sum(b for _, b in pairs) + 1 + width, 2 * matrices


def test_complex_parameters_count_twice_and_flops_add_up(folder):
    n, w, m, kept = 8, 4, 4, 3
    params, flops = pointwise(w, 3)
    spectral = w * w * m * kept
    task = validate(small(folder))
    assert task.params == params + w + 2 * spectral
    fft = w * 2 * (n * 5 * n * 3 // 2 + kept * 5 * n * 3)
    assert task.flops() == n * n * flops + 8 * spectral + fft

    task = validate(small(folder, "monarch_operator"))
    pair = n * (4 + 2)  # slice rank 1: 2 blocks of 4 x 4 and 4 of 2 x 2
    assert task.params == params + w + 2 * spectral + 4 * 2 * pair
    of_pair = task.table["layers_0/spectral/forward_0"].bound.cost(1).flops
    assert task.flops() == n * n * flops + 8 * spectral + 2 * of_pair * w * (n + kept)

    task = validate(small(folder, "unet"))
    at_top, below = 9 * (3 * w + w * w + 2 * w * w + 2 * w * w + w * w) + w, 9 * (2 * w * w + 4 * w * w)
    assert task.flops() == 2 * (n * n * at_top + (n // 2) ** 2 * below)

    task = validate(small(folder, "resnet"))
    assert task.flops() == 2 * n * n * (9 * (3 * w + 2 * w * w) + w)
    assert task.params == 9 * (3 * w + 2 * w * w) + 3 * w + 3 * 2 * w + w + 1


def test_padding_is_multiplied_in_the_layers_alone(folder):
    config, larger = small(folder), small(folder)
    config.model.update(padding=0.125, modes=10, norm="instance")
    larger.model.modes = 10
    larger.data.update(resolution=10, solve_resolution=20)
    task, of_ten = validate(config), validate(larger)
    side = {"lift_up": 8, "layers_0/skip": 10, "layers_0/mlp_up": 10, "project_up": 8, "head": 8}
    assert {path: task.rows_at(path) for path in side} == {path: 8 * n**2 for path, n in side.items()}
    assert task.rows_at("layers_0/spectral") == 8 and task.other_flops == of_ten.other_flops
    inside = sum(side[path] ** 2 * site.bound.cost(1).flops for path, site in task.table.items() if path in side)
    rest = 64 * task.table["lift_down"].bound.cost(1).flops + 100 * task.table["layers_0/mlp_down"].bound.cost(1).flops
    spectral = task.table["layers_0/spectral"].bound.cost(1).flops
    assert task.flops() == task.other_flops + inside + rest + spectral


def test_patches_are_rows(folder):
    config = small(folder)
    config.data.resolution = 16
    config.model.update(levels=1, margin=0.125)
    task, side = validate(config), 8 + 2 * 2
    assert task.rows_at("layers_0/spectral") == 8 * 4 and task.rows_at("head") == 8 * 4 * side**2
    assert task.table["lift_up"].bound.d_in == 2 * (1 + 2)  # two windows, each with two coordinates


def test_rules_of_a_config_reach_spectral_weights_and_their_rates(folder):
    config = small(folder, structure=TUCKER)
    config.model.update(width=8, layers=2)
    task = validate(config)
    bounds = [task.table[f"layers_{i}/spectral"].bound for i in range(2)]
    assert all(b.structure.name == "tucker" and 0.05 < b.params / (2 * b.d_in * b.d_out) <= 0.1 for b in bounds)
    assert sum(site.bound.structure.name != "dense" for site in task.table.values()) == 2
    config.structure = "dense()"
    task = validate(config)  # of width 8; the model of its learning rates is of width 4
    rates = multipliers(task.table, sites(task.base, *task.example), jax.eval_shape(lambda: drawn(task))["params"])
    assert rates["layers_0"]["spectral"] == {"kernel": 4 / 8, "bias": 1} and rates["lift_up"]["kernel"] == 1


WRONG = [
    ("fno", "data.seed", -1),
    ("fno", "data.resolution", 3),
    ("fno", "data.solve_resolution", 12),
    ("fno", "data.fine", 12),
    ("fno", "data.fine", 8),
    ("monarch_operator", "data.fine", 16),
    ("fno", "data.viscosity", 0.0),
    ("fno", "data.time", -1.0),
    ("fno", "data.dt", 0.3),
    ("fno", "data.start", 0.2),
    ("fno", "data.start", 0.5),
    ("fno", "data.start", -0.25),
    ("fno", "data.train", 0),
    ("fno", "data.test", 0),
    ("fno", "data.loss", "l3"),
    ("fno", "model.modes", 9),
    ("fno", "model.layers", 0),
    ("fno", "model.levels", 2),
    ("fno", "model.levels", -1),
    ("fno", "model.margin", 1.5),
    ("fno", "model.padding", -0.1),
    ("fno", "model.norm", "instanse"),
    ("monarch_operator", "model.modes", 9),
    ("monarch_operator", "model.transform", "monarch(blocks=3)"),
    ("monarch_operator", "model.transform", "monrach(blocks=2)"),
    ("unet", "model.depth", 4),
    ("unet", "model.view", "channels"),
    ("unet", "model.width", 0),
    ("resnet", "model.blocks", 0),
    ("resnet", "model.view", "channels"),
]


@pytest.mark.parametrize(("model", "field", "value"), WRONG)
def test_what_cannot_be_is_refused_by_its_field(model, field, value, folder):
    config = small(folder, model)
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert caught.value.field == field and repr(value) in str(caught.value)


def test_padding_and_patches_exclude_each_other(folder):
    config = small(folder)
    config.model.update(padding=0.1, margin=0.125)
    with pytest.raises(ConfigError, match=r"model\.padding = 0\.1: .*margin=0\.125 read the domain as a torus"):
        validate(config)


def test_the_dry_run_shows_complex_sites(folder, monkeypatch):
    class NoMemory:
        memory_analysis = lambda self: None

    monkeypatch.setattr(dry_run, "compile_step", lambda *_: NoMemory())
    out = io.StringIO()
    config = small(folder, structure=TUCKER)
    dry_run.dry_run(config, Console(file=out, width=200))
    text, task = out.getvalue(), validate(config)
    assert "layers_0/spectral" in text and "tucker(rank=" in text and f"{task.params:,}" in text
    assert f"FLOPs per field: {task.flops():,} forward" in text


def resume(config, tmp_path):
    """Train whole, and killed and resumed; the rows of metrics."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = loop.train(config, whole)
    with pytest.raises(Killed):
        loop.train(config, parts, on_step=kill_at(7))
    record = loop.train(config, parts)
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert record.metrics["heldout"] == expected.metrics["heldout"]
    return read_metrics(whole)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "structure"),
    [("fno", TUCKER), ("monarch_operator", "dense()"), ("unet", ".*/conv. -> tucker(rank=3)"), ("resnet", "dense()")],
)
def test_learns_and_resumes_to_the_bit(model, structure, folder, tmp_path):
    config = small(folder, model, structure=structure)
    config.optim.lr = 0.03
    losses = [row["loss"] for row in resume(config, tmp_path) if "loss" in row]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    sums = array_sums(tmp_path / "whole")
    if model not in ("unet", "resnet"):
        assert any("spectral" in name for name in sums)


def steps_on(config, **mesh):
    """Losses and held-out figures of a run of four steps, on the first devices."""
    config.mesh.update(mesh)
    count = math.prod(mesh.values())
    task = validate(config, count)
    source, grid = task.load(), make_mesh(mesh, jax.devices()[:count])
    tx, schedule = optimizer_for(config, task)
    with on_mesh(grid):
        template = plan_state(task, tx, None, grid)
        state = create_state(task, tx, None, template, 0)
        compiled = compile_step(task, make_step(task, tx, None, schedule, 0), template, grid)
        found = []
        for step in range(4):
            state, metrics = compiled(state, shard_batch(grid, source.batch(step, None)))
            found.append(float(metrics["loss"]))
        return found, evaluate(make_eval_step(task, grid), state, source, grid)


@pytest.mark.parametrize(
    ("model", "structure"),
    mostly_long([("fno", "dense()"), ("fno", TUCKER), ("monarch_operator", "dense()")], [("fno", "dense()")]),
)
def test_gradients_by_the_matrices_are_those_of_the_step(model, structure, folder):
    """Of a dense complex weight its own; of its factors what the chain rule makes of them."""
    task = validate(small(folder, model, structure=structure))
    variables, batch = drawn(task), task.load().batch(0, None)
    table = {path: site for path, site in task.table.items() if "spectral" in path}
    value = lambda v: task.loss(task.model, v, batch, None, False)[0]
    of_both = lambda v: (dense_gradients(value, v, table), gradients(task, v, batch, jax.random.key(0))[1])
    found, own = jax.jit(of_both)(variables)
    for path, site in table.items():
        params, mine = site_params(variables, path, site), site_params({"params": own}, path, site)
        assert found[path].dtype == jnp.complex64 and jnp.abs(found[path].imag).max() > 0
        _, back = jax.vjp(site.bound.materialize, params)
        jax.tree.map(
            lambda chain, leaf: np.testing.assert_allclose(chain.conj(), leaf, atol=2e-5 * np.abs(leaf).max()),
            back(found[path].conj())[0],
            mine,
        )


@pytest.mark.long
@pytest.mark.parametrize("structure", [TUCKER])
def test_a_mesh_gives_the_losses_of_one_device(structure, folder):
    config = small(folder, structure=structure)
    config.model.update(width=8, layers=2)
    config.data.update(fine=16, loss="h1")
    config.optim.update(lr=0.02, warmup=1.0)
    alone, errors = steps_on(config, data=1, fsdp=1, tensor=1)
    assert alone[-1] < alone[0]
    for mesh in (dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)):
        losses, others = steps_on(config, **mesh)
        np.testing.assert_allclose(losses, alone, rtol=1e-5, err_msg=str(mesh))
        assert others == pytest.approx(errors, rel=1e-5)


@pytest.mark.parametrize(
    "model", ["fno", *(pytest.param(m, marks=pytest.mark.long) for m in ("monarch_operator", "unet", "resnet"))]
)
def test_steps_against_the_gradient_descend(model, folder):
    """Among complex leaves too, each by itself: a gradient that was not conjugated would climb."""
    task = validate(small(folder, model))
    variables, batch = drawn(task), task.load().batch(0, None)
    both = jax.jit(lambda params: gradients(task, {"params": params}, batch, jax.random.key(0))[:2])
    leaves, tree = jax.tree.flatten(jax.device_get(variables["params"]))
    value, grads = jax.device_get(both(variables["params"]))
    assert any(np.iscomplexobj(leaf) for leaf in leaves) == (model not in ("unet", "resnet"))
    for i, grad in enumerate(jax.tree.leaves(grads)):
        size = np.linalg.norm(grad)
        moved = [*leaves[:i], (leaves[i] - 2e-3 / size * grad).astype(grad.dtype), *leaves[i + 1 :]]
        drop = value - jax.device_get(both(jax.tree.unflatten(tree, moved))[0])
        assert drop == pytest.approx(2e-3 * size, rel=0.1, abs=2e-6), i
