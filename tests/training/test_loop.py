"""The loop on tiny runs: learning, resuming to the bit, non-finite steps, who owns a workdir."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from structmat.data.errors import DataError
from structmat.training import loop
from structmat.training.errors import ConfigError, RunError
from structmat.training.metrics import read_metrics
from structmat.training.record import Record
from structmat.training.tasks import digits
from tests.training.small_runs import small_digits, small_lm, write_corpus
from tests.training.test_step import Ball


class Killed(Exception):
    pass


def kill_at(when):
    def on_step(step, row):
        if step == when:
            raise Killed

    return on_step


@pytest.fixture(scope="module", autouse=True)
def compile_fast(tmp_path_factory):
    """Compile without optimisation, and let runs of one config share their programs."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def array_sums(folder):
    """Checksum of every array of the newest checkpoint."""
    newest = max((p for p in (folder / "checkpoints").iterdir()), key=lambda p: int(p.name))
    body = json.loads((newest / "MANIFEST.json").read_text())["body"]
    return {name: array["checksum"] for name, array in body["arrays"].items()}


RESUMED = [
    pytest.param(small_digits(), None, id="dense", marks=pytest.mark.long),
    pytest.param(
        small_digits(structure="low_rank(rank=4) + random_sparse(density=0.1)"), Ball(), id="index-leaf-and-rule"
    ),
]


@pytest.mark.parametrize(("config", "rule"), RESUMED)
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(config, rule, tmp_path):
    config.model.dropout = 0.1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = loop.train(config, whole, rule=rule)
    with pytest.raises(Killed):
        loop.train(config, parts, rule=rule, on_step=kill_at(7))
    assert [row["step"] for row in read_metrics(parts)][-1] == 7
    seen = []
    record = loop.train(config, parts, rule=rule, on_step=lambda step, row: seen.append(step))
    assert seen == list(range(6, 13))
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert record.metrics["heldout"] == expected.metrics["heldout"]
    if rule is not None:
        sums = array_sums(whole)
        assert any("rule_state/seen" in name for name in sums) and any(name.startswith("frozen/") for name in sums)


def test_lm_learns_and_writes_its_record(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = small_lm(corpus, steps=40, structure="fit(low_rank(), params=0.5)", log_every=10)
    config.optim.lr = 0.01
    config.mesh.update(data=4, fsdp=2)
    config.eval.every = 20
    config.checkpoint.every = 20
    record = loop.train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [r["step"] for r in rows] == [10, 20, 20, 30, 40, 40]
    assert record.metrics["heldout"]["bits_per_byte"] < 4.5
    assert rows[-1]["heldout_bits_per_byte"] == record.metrics["heldout"]["bits_per_byte"]
    assert rows[2]["heldout_bits_per_byte"] > rows[-1]["heldout_bits_per_byte"]
    assert record == Record.read(tmp_path / "run" / "record.json")
    assert record.structures["layers_0/attn/q"].startswith("low_rank(rank=")
    assert record.metrics["site_params"] < record.metrics["dense_site_params"]
    assert record.metrics["step_seconds"] > 0 and record.metrics["skipped"] == 0
    assert loop.train(config, tmp_path / "run") == record


@pytest.mark.long
def test_digits_reaches_ninety_percent(tmp_path):
    config = small_digits(steps=120, batch=64, structure="monarch(blocks=4)", log_every=50)
    config.model.width = 64
    config.checkpoint.every = 120
    config.eval.batches = 0
    record = loop.train(config, tmp_path / "run")
    assert record.metrics["heldout"]["accuracy"] > 0.9
    assert record.metrics["reference"]["majority_class"] < 0.15


def poisoned(steps):
    """The digits with NaN pixels at these steps."""
    clean = digits.digits.digits_batch

    def batch(seed, step, size, rows=None):
        data = clean(seed, step, size, rows)
        return data | {"images": data["images"] * (np.nan if step in steps else 1)}

    return batch


def test_non_finite_steps_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(digits.digits, "digits_batch", poisoned({3, 4, 9}))
    record = loop.train(small_digits(max_skips=3), tmp_path / "run")
    assert record.metrics["skipped"] == 3
    assert np.isfinite(record.metrics["heldout"]["loss"])
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows if row["skipped"]] == [4, 5, 10]
    assert [row["skipped"] for row in rows[3:6]] == [1, 2, 0]


def test_too_many_non_finite_steps_stop_the_run_and_a_resumed_one_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(digits.digits, "digits_batch", poisoned({7, 8, 9, 10, 11}))
        with pytest.raises(RunError) as caught:
            loop.train(small_digits(max_skips=3), tmp_path / "run")
    text = str(caught.value)
    assert "stopped at step 10" in text and "3 steps in a row" in text and "loss" in text
    assert "head/bias" in text and str(tmp_path / "run" / "checkpoints" / "5") in text
    assert not (tmp_path / "run" / "record.json").exists()
    assert loop.train(small_digits(max_skips=3), tmp_path / "run").metrics["skipped"] == 0


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    stop = lambda step, row: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Interrupted, match="after step 4, which is saved"):
        loop.train(small_digits(), tmp_path / "run", on_step=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []
    loop.train(small_digits(), tmp_path / "run", on_step=lambda step, row: seen.append(step))
    assert seen[0] == 5


def test_sigterm_while_compiling_ends_the_run_before_its_next_step(tmp_path, monkeypatch):
    original = loop.compile_step

    def compile_step(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "compile_step", compile_step)
        with pytest.raises(loop.Interrupted, match="before step 1; nothing is lost"):
            loop.train(small_digits(), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert loop.train(small_digits(), tmp_path / "run").metrics["steps"] == 12


def test_structures_come_from_the_checkpoint_not_from_the_rules(tmp_path, monkeypatch):
    config = small_digits(structure="fit(low_rank(), params=0.5)")
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", on_step=kill_at(7))
    original, calls = loop.validate, []

    def other_choice(config):
        calls.append(config)
        task = original(config)
        return task.with_model(task.model.clone(structures=(("layers_0", "low_rank(rank=1)"),)))

    monkeypatch.setattr(loop, "validate", other_choice)
    record = loop.train(config, tmp_path / "run")
    assert calls and record.structures["layers_0"].startswith("low_rank(rank=6")


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    loop.train(small_digits(), folder)
    return folder


def test_workdir_of_another_config_is_refused_untouched(finished):
    before = snapshot(finished)
    other = small_digits(seed=1)
    other.optim.lr = 0.5
    with pytest.raises(RunError) as caught:
        loop.train(other, finished)
    assert "seed: there 0, now 1" in str(caught.value) and "optim.lr: there 0.004, now 0.5" in str(caught.value)
    with pytest.raises(RunError, match="rule: there ''"):
        loop.train(small_digits(), finished, rule=Ball())
    assert snapshot(finished) == before


def test_finished_run_is_not_run_again(finished, monkeypatch, caplog):
    before = snapshot(finished)
    monkeypatch.setattr(loop, "compile_step", None)
    again = small_digits(log_every=3)
    again.checkpoint.keep = 1
    record = loop.train(again, finished)
    assert record.metrics["steps"] == 12 and "has finished" in caplog.text
    assert snapshot(finished) == before


def test_data_that_changed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        loop.train(small_digits(), tmp_path / "run", on_step=kill_at(7))
    before, data = snapshot(tmp_path / "run"), digits.digits.load()
    monkeypatch.setattr(digits.digits, "load", lambda: dataclasses.replace(data, sha256="0" * 64))
    with pytest.raises(RunError, match=f"hash {data.sha256[:12]} there, 000000000000 now"):
        loop.train(small_digits(), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


def test_wrong_input_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compile_step", None)
    run, config = tmp_path / "run", small_digits()
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        config.optim.lr = -1.0
        loop.train(config, run)
    with pytest.raises(DataError, match="missing"):
        loop.train(small_lm(tmp_path / "missing"), run)
    assert not run.exists()
    with pytest.raises(RunError, match="is a file"):
        (tmp_path / "file").write_text("x")
        loop.train(small_digits(), tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(RunError, match=r"holds todo.txt, but no config.json"):
        loop.train(small_digits(), tmp_path / "notes")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["todo.txt"]


@pytest.mark.long
def test_profile_writes_a_trace(tmp_path):
    loop.train(small_digits(steps=4, profile="1:3"), tmp_path / "run")
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
