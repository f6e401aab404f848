import jax
import numpy as np
import pytest

from experiments.compare import SMALL, compare, make_arms
from structmat.models.decode import generate
from structmat.training import config as defaults
from structmat.training.errors import ConfigError, RunError
from structmat.training.load import load_run
from structmat.training.record import Record

STRUCTURES = ["fit(low_rank() + monarch(blocks=4), params=0.8)"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    config = defaults.default("lm")
    config.update(dict(steps=2, batch=8, seed=3))
    config.model.update(dict(width=16, heads=2, layers=1, context=8))
    config.mesh.update(dict(data=-1, fsdp=1, tensor=1))
    config.data.root = str(folder)
    config.eval.batches = 3
    return config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "mine"
    return folder, compare(config, folder, STRUCTURES)


def test_arms_share_everything_but_the_weights(config):
    arms = make_arms(config, STRUCTURES)
    assert [a.label for a in arms] == ["dense", SMALL, *STRUCTURES]
    dense, small, low = arms
    assert small.params <= max(a.params for a in arms[2:]) < dense.params
    wider = small.config.copy_and_resolve_references()
    wider.model.width += 2
    assert make_arms(wider, STRUCTURES)[0].params > max(a.params for a in arms[2:])
    same = lambda c: {k: v for k, v in c.to_dict().items() if k not in ("structure", "model")}
    assert same(low.config) == same(dense.config)


def test_one_structure_in_two_spellings_is_one_arm(config):
    arms = make_arms(config, ["low_rank(rank=2)", "low_rank(2)", "dense", "dense()"])
    assert [a.label for a in arms] == ["dense", SMALL, "low_rank(rank=2)"]


def test_no_dense_small_when_nothing_is_saved(config):
    assert [a.label for a in make_arms(config, ["low_rank(rank=16)"])] == ["dense", "low_rank(rank=16)"]


@pytest.mark.long
def test_report_and_records(finished):
    folder, record = finished
    rows = record.metrics["rows"]
    assert rows[0]["label"] == "dense" and len(rows) == 3
    low = rows[2]
    assert low["structures"] == ["low_rank(rank=2) + monarch(blocks=4)", "low_rank(rank=6) + monarch(blocks=4)"]
    assert 0.5 < low["site_share"] <= 0.8
    assert low["flops_per_unit"] < rows[0]["flops_per_unit"] and low["model_share"] < 1
    assert all(np.isfinite(r["metric"]) for r in rows)
    text = (folder / "table.md").read_text()
    assert all(s in text for s in [*STRUCTURES, "byte bigram", "held-out bits per byte", "seed 3"])
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert Record.read(folder / "compare.json") == record
    assert len(list((folder / "arms").glob("*/record.json"))) == 3


@pytest.mark.long
def test_a_second_run_reads_the_records(config, finished, monkeypatch):
    folder, record = finished
    monkeypatch.setattr("experiments.compare.train", lambda *a, **k: pytest.fail("trained again"))
    again = compare(config, folder, STRUCTURES)
    assert again.metrics == record.metrics


@pytest.mark.long
def test_another_config_in_the_folder_is_refused_before_any_arm(config, finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr("experiments.compare.train", lambda *a, **k: pytest.fail("trained"))
    other = config.copy_and_resolve_references()
    other.seed = 4
    with pytest.raises(RunError, match="seed: there 3, now 4"):
        compare(other, folder, STRUCTURES)


def test_bad_arms_are_refused_before_any_starts(config, tmp_path):
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(config, tmp_path / "a", [])
    with pytest.raises(ConfigError, match=r"blocks=3 does not fit"):
        compare(config, tmp_path / "a", ["low_rank(rank=2)", "monarch(blocks=3)"])
    assert not (tmp_path / "a").exists()


@pytest.mark.long
def test_a_run_loads_and_generates(finished):
    folder, _ = finished
    run = load_run(folder / "arms" / "fit_low_rank_monarch_blocks_4_params_0.8")
    assert run.step == 2 and dict(run.task.model.structures)["layers_0/mlp/up"].terms[1].blocks == 4
    prompt = np.array([[116, 104], [101, 32]], np.int32)
    greedy = generate(run.task.model, run.variables, prompt, 6, jax.random.key(0), temperature=0.0)
    text = prompt
    for _ in range(6):
        logits = run.task.model.apply(run.variables, text)
        text = np.concatenate([text, np.asarray(logits[:, -1].argmax(-1))[:, None]], 1)
    np.testing.assert_array_equal(greedy, text[:, 2:])
    with pytest.raises(ValueError, match="do not fit context=8"):
        generate(run.task.model, run.variables, prompt, 7, jax.random.key(0))


def test_loading_from_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(config.json is missing\)"):
        load_run(tmp_path)
