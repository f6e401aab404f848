"""Records: what they hold, that they come back equal, how bad ones are refused, keys and comparison."""

import dataclasses
import json
import math
import subprocess
import sys

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from structmat.training import environment
from structmat.training.plain_json import canonical, number, plain
from structmat.training.record import Record, RecordError, content_key, load_records, same_data


def create(**changes):
    values = {
        "name": "demo",
        "kind": "train",
        "config": {"lr": 0.1, "mesh": (4, 2), "opt": {"b1": 0.9}},
        "structures": {"gpt/layers_0/mlp": "low_rank(rank=8)"},
        "seed": np.int64(3),
        "data_hash": "ab" * 32,
        "seconds": 1.5,
        "metrics": {"loss": jnp.float32(0.1), "curve": [1, 2.5], "bad": math.nan},
    }
    return Record.create(**(values | changes))


def test_create_write_read(tmp_path):
    record = create()
    path = record.write(tmp_path / "deep" / "demo.json")
    assert Record.read(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert record.config["mesh"] == [4, 2] and record.metrics["loss"] == float(np.float32(0.1))
    assert math.isnan(number(record.metrics["bad"]))
    assert record.date.endswith("+00:00") and record.memory_bytes > 10_000_000
    assert record.device["platform"] == "cpu" and record.device["cores"] >= 1 and record.device["cpu"]
    assert {"python", "jax", "jaxlib", "flax", "optax", "structmat"} <= set(record.versions)


def test_config_dict_is_plain():
    config = ml_collections.ConfigDict({"lr": 0.1, "mesh": (4, 2), "opt": {"b1": 0.9}})
    assert create(config=config).config == create().config


def test_failed_write_leaves_the_old_record(tmp_path):
    path = create().write(tmp_path / "a.json")
    broken = dataclasses.replace(create(), metrics={"x": object()})
    with pytest.raises(TypeError):
        broken.write(path)
    assert Record.read(path).name == "demo"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "field 'name' is missing"),
        ({"metric": {}}, "unknown field 'metric'; did you mean 'metrics'"),
        ({"seed": "3"}, "field 'seed' is '3'; it must be int"),
        ({"seed": True}, "field 'seed' is True; it must be int"),
        ({"seconds": [1]}, "field 'seconds'.*int or float"),
        ({"structures": {"a": 3}}, "field 'structures', entry 'a' is 3"),
        ({"kind": "trian"}, "field 'kind' is 'trian'; did you mean 'train'"),
        ({"date": "yesterday"}, "field 'date' is 'yesterday'"),
        ({"schema": 2}, "field 'schema' is 2; this version reads 1"),
    ],
)
def test_read_names_file_and_field(tmp_path, changes, message):
    fields = dataclasses.asdict(create()) | changes
    path = tmp_path / "r.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != "name" or v is not None}))
    with pytest.raises(RecordError, match=message) as e:
        Record.read(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_unreadable(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecordError, match=r"r\.json"):
        Record.read(path)
    with pytest.raises(RecordError, match=r"none\.json"):
        Record.read(tmp_path / "none.json")


def test_create_refuses_what_has_no_json_form():
    with pytest.raises(RecordError, match=r"'demo': config\.a\[1\] is a object"):
        create(config={"a": [1, object()]})
    with pytest.raises(RecordError, match="'kind' is 'x'"):
        create(kind="x")


def test_load_records(tmp_path):
    for name in ("b", "a"):
        create(name=name).write(tmp_path / f"{name}.json")
    create(name="c").write(tmp_path / "sub" / "c.json")
    assert [r.name for r in load_records(tmp_path)] == ["a", "b", "c"]
    with pytest.raises(RecordError, match="not a folder"):
        load_records(tmp_path / "none")


def test_content_key():
    base = content_key({"a": 1, "b": {"x": (1, 2)}}, {"p": "dense()"}, "h")
    assert base == content_key({"b": {"x": [1, 2]}, "a": 1}, {"p": "dense()"}, "h")
    assert len(base) == 12
    others = [
        content_key({"a": 2, "b": {"x": (1, 2)}}, {"p": "dense()"}, "h"),
        content_key({"a": 1, "b": {"x": (1, 2)}}, {"p": "low_rank(rank=1)"}, "h"),
        content_key({"a": 1, "b": {"x": (1, 2)}}, {"p": "dense()"}, "i"),
    ]
    assert len({base, *others}) == 4
    record = create()
    assert record.key == create(seconds=9, metrics={}).key == content_key(record.config, record.structures, "ab" * 32)


def test_same_data():
    assert same_data([create(), create(name="b")]) == "ab" * 32
    with pytest.raises(RecordError, match=r"'demo' and 'other' were made on different data \(abab.* and cdcd"):
        same_data([create(), create(name="b"), create(name="other", data_hash="cd" * 32)])
    with pytest.raises(RecordError, match="no records"):
        same_data([])


def test_floats_survive_and_non_finite_are_strings():
    values = [0.1, 1e-310, -0.0, 1 / 3, np.float32(1 / 3), jnp.bfloat16(1.0078125), np.bool_(True), np.arange(2)]
    back = json.loads(canonical(values))
    assert back == [0.1, 1e-310, 0.0, 1 / 3, float(np.float32(1 / 3)), 1.0078125, True, [0, 1]]
    assert math.copysign(1, back[2]) == -1
    assert plain([math.inf, -np.float32(np.inf), math.nan]) == ["Infinity", "-Infinity", "NaN"]
    assert number("-Infinity") == -math.inf
    for bad in ("x", None, [1]):
        with pytest.raises(ValueError, match="not a number"):
            number(bad)
    with pytest.raises(TypeError, match="key 3"):
        plain({"a": {3: 1}})


def test_git_commit(tmp_path):
    git = lambda *a: subprocess.run(["git", "-C", str(tmp_path), *a], check=True, capture_output=True, text=True).stdout
    assert environment.git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "__init__.py").write_text("")
    assert environment.git_commit(tmp_path) is None  # inside a repository that does not track it
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert environment.git_commit(tmp_path) == head
    (tmp_path / "__init__.py").write_text("1")
    assert environment.git_commit(tmp_path) == head + "+changes"


def test_command_has_no_machine_path(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "tool.py"), "--config=a b"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert environment.command() == "python tool.py '--config=a b'"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("S", (), {"name": "experiments.train"}))
    assert environment.command() == "python -m experiments.train '--config=a b'"


def test_peaks():
    assert environment.peak_flops("TPU v5 lite") == 197e12
    assert environment.peak_flops("TPU v5p") == environment.peak_flops("TPU v5") == 459e12
    assert environment.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert environment.peak_flops() is None
