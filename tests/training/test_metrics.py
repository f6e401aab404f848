"""metrics.jsonl: exact floats, resume without duplicates, a line cut short, TensorBoard, process 0 only."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.training.metrics import FILE, MetricWriter, read_metrics


def run(workdir, steps, resume=None, **kwargs):
    with MetricWriter(workdir, resume, tensorboard=False, **kwargs) as writer:
        for step in steps:
            writer.write(step, {"loss": np.float32(1) / np.float32(step + 3)})


def test_floats_are_exact_and_lines_are_there_at_once(tmp_path):
    values = {"a": jnp.float32(1 / 3), "b": 0.1, "n": np.int64(7), "nan": math.nan, "inf": -math.inf, "ok": True}
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, values)
        [row] = read_metrics(tmp_path)  # before closing
    assert row.pop("step") == 5 and math.isnan(row.pop("nan"))
    assert row == {"a": float(np.float32(1 / 3)), "b": 0.1, "n": 7.0, "inf": -math.inf, "ok": 1.0}
    json.loads((tmp_path / FILE).read_text(), parse_constant=lambda text: pytest.fail(text))


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", range(10))
    run(tmp_path / "cut", range(8))
    path = tmp_path / "cut" / FILE
    path.write_bytes(path.read_bytes() + b'{"step": 8, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path / "cut")] == list(range(8))
    run(tmp_path / "cut", range(6, 10), resume=5)
    assert path.read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_without_a_checkpoint_it_starts_empty(tmp_path):
    run(tmp_path, range(3))
    run(tmp_path, range(2))
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]
    assert read_metrics(tmp_path / "never") == []


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": np.zeros(2)}, "'loss' at step 4"),
        ({"note": "text"}, "'note' at step 4"),
        ({"step": 3}, "'step' at step 4"),
    ],
)
def test_only_scalars(tmp_path, metrics, message):
    with MetricWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match=message):
        writer.write(4, metrics)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", [b"x", b"[]", b'{"loss": 1}', b'{"step": "1"}'])
def test_a_damaged_file_is_named(tmp_path, line):
    (tmp_path / FILE).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=rf"{FILE} line 2"):
        MetricWriter(tmp_path, resume_step=1, tensorboard=False)
    assert line in (tmp_path / FILE).read_bytes()  # nothing overwritten


def test_tensorboard(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.25, "gone": math.nan})
    [events] = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"loss" in data and np.float32(0.25).tobytes() in data


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path / "other", range(3))
    assert not (tmp_path / "other").exists()
