"""MRI as a task: its scans, loss and references, what `structure` means for mSENSE, learning and resuming with complex leaves."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import mri as mri_config
from structmat.data.mri import acquisition, dataset, masks
from structmat.training import loop
from structmat.training.config import default, validate
from structmat.training.dry_run import dry_run
from structmat.training.errors import ConfigError
from structmat.training.metrics import read_metrics
from structmat.training.task import dump_table, mean_metrics, with_table
from structmat.training.tasks import mri, mri_models
from tests.marks import mostly_long
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401  the fixture is used


def small(model="msense", **data):
    """Two or three small coils on images of side 16; a U-Net of width 4."""
    config = default("mri", model)
    config.update(steps=12, batch=8, log_every=1)
    config.data.update(size=16, coils=3, acceleration=4.0, test=12)
    config.data.update(data)
    config.optim.update(lr=5e-3, weight_decay=0.0)
    config.checkpoint.every = 5
    if model == "unet":
        config.model.update(width=4, depth=2)
        config.mup.base_width = 4
    else:
        config.structure = "monarch(blocks=4)"
    return config


@pytest.fixture(autouse=True)
def short_tuning(monkeypatch):
    monkeypatch.setattr(mri, "WEIGHTS", (0.0, 1e-2))
    monkeypatch.setattr(mri, "ITERATIONS", (3, 15))


def test_batches_follow_seed_and_step_and_noise_may_be_fresh():
    fixed, fresh = validate(small()), validate(small(fresh_noise=True))
    for task in (fixed, fresh):
        source = task.load()
        batch, again, later = source.batch(3, None), source.batch(3, None), source.batch(4, None)
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
            n: (s.shape, s.dtype) for n, s in task.batch.items()
        }
        part = source.batch(3, range(2, 5))
        for field, array in batch.items():
            assert np.array_equal(array, again[field]) and np.array_equal(array[2:5], part[field])
        assert not np.array_equal(batch["kspace"], later["kspace"])
        assert all(one["kspace"].shape == batch["kspace"].shape for one in source.heldout())
    data = dataset.load(16, 3, 4.0, "poisson_disc", (20.0, 20.0), 5, 12, 0)
    scans = [dataset.scan_batch(data, 0, step, 8, True) for step in range(10)]
    image, kspace = (np.concatenate([s[name] for s in scans]) for name in ("image", "kspace"))
    noise = kspace - acquisition.forward(image, data.machine.maps, data.machine.mask)
    assert not noise[..., ~data.machine.mask].any()
    taken = noise[..., data.machine.mask] / acquisition.noise_level(image, 20.0)[..., None, None]
    assert np.mean(np.abs(taken) ** 2) == pytest.approx(1, rel=0.02)
    draws = taken.reshape(len(taken), -1)
    overlap = np.abs(draws @ draws.conj().T) / draws.shape[1]
    assert overlap[~np.eye(len(draws), dtype=bool)].max() < 0.3


def test_parts_share_no_phantom_and_fewer_scans_are_the_first_of_more():
    load = lambda train, seed: dataset.load(16, 3, 2.0, "random", (20.0, 20.0), train, 4, seed)
    few, more, other = load(2, 0), load(5, 0), load(5, 1)
    assert np.array_equal(few.train["kspace"], more.train["kspace"][:2])
    assert np.array_equal(few.test["kspace"], more.test["kspace"])
    images = [image.tobytes() for d in (more, other) for part in (d.train, d.test) for image in part["image"]]
    assert len(set(images)) == 2 * (5 + 4)
    assert len({d.sha256 for d in (few, more, other)}) == 3


def test_loss_of_no_image_is_one_and_padding_counts_for_nothing():
    """Nothing reconstructed has the image's energy for an error; scores of a random model are those of plain numpy."""
    task = validate(small())
    source = task.load()
    scans = list(source.heldout())
    assert len(scans) == 2 and not scans[1]["image"][4:].any()
    shapes = jax.eval_shape(
        lambda: task.model.init(jax.random.key(0), *(jnp.zeros(e.shape, e.dtype) for e in task.example))
    )
    rng = np.random.default_rng(0)
    draw = lambda s: (rng.normal(size=s.shape) + 1j * rng.normal(size=s.shape)).astype(np.complex64)
    score = jax.jit(lambda variables, batch: task.loss(task.model, variables, batch, None, False)[1])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    variables = jax.tree.map(draw, shapes)
    parts = [score(zeros, batch) for batch in scans]
    assert [float(p["count"]) for p in parts] == [8, 4]
    image = np.concatenate([batch["image"] for batch in scans])[:12].astype(float)
    db = lambda square: 10 * np.log10(image.max((-2, -1)) ** 2 / square.mean((-2, -1))).mean(0)
    found = mean_metrics(parts)
    assert found["loss"] == pytest.approx(1, rel=1e-6)
    assert [found["psnr_1"], found["psnr_2"]] == pytest.approx(list(db(image**2)), rel=1e-5)
    found = mean_metrics([score(variables, batch) for batch in scans])
    out = np.concatenate([mri_models.msense_image(task.model, variables, b, None, False)[0] for b in scans])[:12]
    relative = (np.abs(out - image) ** 2).sum((-2, -1)) / (image**2).sum((-2, -1))
    assert found["loss"] == pytest.approx(relative.mean(), rel=1e-4)
    assert [found["psnr_1"], found["psnr_2"]] == pytest.approx(list(db((np.abs(out) - image) ** 2)), rel=1e-4)
    assert -1 < found["ssim_1"] < 0.9


@pytest.mark.parametrize(
    ("rules", "columns", "rows"),
    [
        ("dense()", "dense()", "dense()"),
        ("monarch(blocks=4)", "monarch(blocks=4)", "monarch(blocks=4)"),
        ("rows -> monarch(blocks=2)", "dense()", "monarch(blocks=2)"),
    ],
)
def test_what_no_rule_matches_is_a_full_matrix_also_from_a_stored_table(rules, columns, rows):
    config = small()
    assert default("mri").structure == "dense()"
    config.structure = rules
    task = validate(config)
    for path, text in (("columns", columns), ("rows", rows)):
        assert str(task.table[path].bound.structure).startswith(text.removesuffix(")"))
    sizes = {"dense()": 2 * 16 * 16, "monarch(blocks=4)": 2 * 16 * (4 + 4), "monarch(blocks=2)": 2 * 16 * (8 + 8)}
    assert task.params == sizes[columns] + sizes[rows]
    config.structure = "low_rank(rank=1)"
    again = with_table(validate(config), dump_table(task.table))
    assert dump_table(again.table) == dump_table(task.table) and again.params == task.params


def test_named_configs_train_monarch_factors_and_a_unet_a_hundred_times_as_large():
    task, large = (validate(mri_config.get_config(arg), devices=1) for arg in ("msense", "unet"))
    assert task.params == 2 * 2 * 64 * (8 + 8)
    assert {site.bound.structure.name for site in task.table.values()} == {"monarch"}
    assert 100 < large.params / task.params < 150
    with pytest.raises(ValueError, match="did you mean 'msense'"):
        mri_config.get_config("msens")


def test_flops_of_a_unet_count_every_convolution_at_its_size():
    config = small("unet")
    conv = lambda side, a, b, k=9: 2 * side**2 * k * a * b
    down = conv(16, 2, 4) + conv(16, 4, 4) + conv(8, 4, 8) + conv(8, 8, 8)
    middle = conv(4, 8, 16) + conv(4, 16, 16)
    up = conv(8, 16, 8) + conv(8, 16, 8) + conv(8, 8, 8) + conv(16, 8, 4) + conv(16, 8, 4) + conv(16, 4, 4)
    transforms = 2 * 3 * 2 * 16 * 5 * 16 * 4
    assert validate(config).flops() == 2 * (down + middle + up + conv(16, 4, 2, 1)) + transforms


def test_references_are_sense_and_tuned_on_training_scans():
    source = validate(small(snr_1=60.0, snr_2=60.0, acceleration=2.0)).load()
    found = source.reference
    names = [f"{score}_{echo}" for score in ("psnr", "ssim") for echo in (1, 2)]
    assert list(found) == [f"{method}_{name}" for method in ("cg_sense", "zero_filled") for name in names]
    assert all(found[f"cg_sense_{name}"] > found[f"zero_filled_{name}"] for name in names)
    data = dataset.load(16, 3, 2.0, "poisson_disc", (60.0, 60.0), 5, 12, 0)
    image = data.test["image"].astype(float)
    folded = np.abs(acquisition.adjoint(data.test["kspace"], data.machine.maps, data.machine.mask))
    decibels = 10 * np.log10(image.max((-2, -1)) ** 2 / ((folded - image) ** 2).mean((-2, -1)))
    assert [found["zero_filled_psnr_1"], found["zero_filled_psnr_2"]] == pytest.approx(list(decibels.mean(0)), rel=1e-4)


def test_every_pattern_reaches_the_largest_acceleration():
    for size, pattern in itertools.product(range(11, 90), ("random", "regular")):
        assert masks.lines((size, size), mri.FASTEST, pattern=pattern).any()
    for size in (11, 14, 15, 25):
        assert masks.poisson_disc((size, size), mri.FASTEST)[0].any()


@pytest.mark.parametrize(
    ("model", "field", "value", "rule"),
    [
        ("msense", "data.size", 10, "at least 11"),
        ("msense", "data.acceleration", 12.5, "at most 12.0"),
        ("msense", "data.acceleration", 0.5, "at least 1.0"),
        ("msense", "data.pattern", "radial", "no such pattern"),
        ("msense", "data.snr_2", -3.0, "at least 0.0"),
        ("msense", "data.train", 0, "at least 1"),
        ("msense", "data.test", 2**17, "at most 65536"),
        ("msense", "model.dtype", "bfloat16", "no such field"),
        ("unet", "model.dropout", 0.1, "no such field"),
        ("unet", "model.depth", 5, "must halve data.size=16 evenly; 4 does"),
        ("unet", "model.width", 0, "at least 1"),
        ("unet", "model.view", "chanel", "did you mean 'channel'"),
    ],
)
def test_wrong_fields_are_named(model, field, value, rule):
    config = small(model)
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(ConfigError, match=rule) as error:
        validate(config)
    assert error.value.field == field and repr(value) in str(error.value)


@pytest.mark.long
def test_few_scans_raise_psnr_and_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    config = small()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = loop.train(config, whole)
    with pytest.raises(Killed):
        loop.train(config, parts, on_step=kill_at(7))
    assert loop.train(config, parts).metrics["heldout"] == expected.metrics["heldout"]
    sums = [array_sums(folder) for folder in (whole, parts)]
    assert sums[0] == sums[1] and any("params" in name for name in sums[0])
    rows = [row for row in read_metrics(whole) if "psnr_1" in row]
    assert len(rows) == 12 and (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    found, start = (expected.metrics[part] for part in ("heldout", "reference"))
    for echo in (1, 2):  # it starts as zero-filled SENSE
        assert found[f"psnr_{echo}"] > start[f"zero_filled_psnr_{echo}"] + 0.3
        assert rows[-1][f"psnr_{echo}"] > rows[0][f"psnr_{echo}"] + 0.3


@pytest.mark.parametrize("model", mostly_long(mri_models.MODELS, ("msense",)))
def test_dry_run_reads_no_scans(model, monkeypatch):
    monkeypatch.setattr(dataset, "load", None)
    out = io.StringIO()
    dry_run(small(model), Console(file=out, width=200))
    assert {"msense": "columns", "unet": "merge_0/conv1"}[model] in out.getvalue()


@pytest.mark.long
def test_a_unet_learns_and_adds_to_the_zero_filled_image(tmp_path):
    config = small("unet")
    config.steps, config.checkpoint.every, config.optim.lr = 40, 40, 1e-2
    record = loop.train(config, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run") if "psnr_1" in row]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert record.metrics["heldout"]["psnr_1"] > rows[0]["psnr_1"]
