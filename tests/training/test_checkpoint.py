"""Checkpoints: round trip, newest step, every kind of damage, mismatches, donation, keeping and cleaning up."""

import hashlib
import json
import random
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.torture.damages import DAMAGES, files
from structmat.training import manifest
from structmat.training.checkpoint import Checkpointer, CheckpointError


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def mesh(shape=(2, 2)):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), devices=devices, axis_types=(AxisType.Auto,) * 2)


BOTH = PartitionSpec("data", "model")


def place(tree, on, sharded=BOTH):
    spec = lambda x: sharded if x.ndim == 2 else PartitionSpec()
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(on, spec(x))), tree)


def make_state(seed=0, on=None):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(16, 8)).astype(np.float32)
    w[0, :3] = -0.0, np.inf, np.nan
    state = {
        "params": {"layer": {"w": w, "b": rng.normal(size=8).astype(jnp.bfloat16)}, "0": {"s": w[:2] + 1j * w[2:4]}},
        "frozen": {"index": rng.integers(0, 99, (4, 8), dtype=np.int32), "mask": rng.random(5) > 0.5},
        "opt": (Moments({"w": w * 2}, np.zeros((), np.int32) + seed), ()),
        "rng": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "none": None,
        "empty": np.zeros((0, 4), np.float32),
    }
    return place(state, on or mesh())


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def three_saves(tmp_path_factory):
    """A workdir with steps 10, 20 and 30, and the state of each."""
    workdir = tmp_path_factory.mktemp("run")
    states = {step: make_state(step) for step in (10, 20, 30)}
    with Checkpointer(workdir) as saver:
        for step, state in states.items():
            saver.save(step, state, {"config": "c = 1", "step": step})
    return workdir, states


@pytest.fixture
def workdir(three_saves, tmp_path):
    shutil.copytree(three_saves[0], tmp_path / "run")
    return tmp_path / "run"


def restore(workdir, template, **kwargs):
    with Checkpointer(workdir, **kwargs) as c:
        return c.restore(template)


def test_round_trip_takes_the_newest(three_saves):
    workdir, states = three_saves
    restored = restore(workdir, abstract(states[10]))
    assert (restored.step, restored.skipped, restored.extra) == (30, (), {"config": "c = 1", "step": 30})
    assert_same_bits(restored.state, states[30])
    for x, y in zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[30])):
        assert x.sharding == y.sharding
    with Checkpointer(workdir) as c:
        found = c.latest()
        assert (found.step, found.extra["step"], c.steps()) == (30, 30, [10, 20, 30])


def test_restores_onto_another_mesh(three_saves):
    workdir, states = three_saves
    for on in (mesh((1, 1)), mesh((4, 1)), mesh((1, 4))):
        template = place(jax.tree.map(np.asarray, states[30]), on, PartitionSpec(None, "model"))
        restored = restore(workdir, template)
        assert_same_bits(restored.state, states[30])
        assert restored.state["params"]["layer"]["w"].sharding.mesh == on


def test_nothing_saved_is_none(tmp_path):
    with Checkpointer(tmp_path / "new") as c:
        assert c.latest() is None and c.restore(make_state()) is None and c.steps() == []
    assert not (tmp_path / "new").exists()


def test_the_saved_values_survive_donation(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = place({"w": np.zeros((256, 256), np.float32), "n": np.zeros((), np.int32)}, mesh())
    template = abstract(state)
    with Checkpointer(tmp_path, keep=9) as c:
        for i in range(1, 4):
            state = step(state)
            c.save(i, state, {})
            for _ in range(3):
                state = step(state)
    for i, expected in ((3, 9), (2, 5), (1, 1)):
        restored = restore(tmp_path, template)
        assert restored.step == i and float(restored.state["w"].min()) == float(restored.state["w"].max()) == expected
        shutil.rmtree(tmp_path / "checkpoints" / str(i))


def test_a_template_may_depend_on_the_step(tmp_path, monkeypatch):
    """Steps of other shapes are fallen back on too, where only loading finds the newest one damaged."""
    states = {size: place({"w": np.arange(size, dtype=np.float32)}, mesh((1, 1))) for size in (4, 8)}
    with Checkpointer(tmp_path) as c:
        for step, size in ((1, 4), (2, 8)):
            c.save(step, states[size], {"size": size})
    restored = restore(tmp_path, lambda extra: abstract(states[extra["size"]]))
    assert restored.step == 2
    assert_same_bits(restored.state, states[8])
    load = Checkpointer._load
    monkeypatch.setattr(
        Checkpointer, "_load", lambda self, step, *rest: ("worn", []) if step == 2 else load(self, step, *rest)
    )
    restored = restore(tmp_path, lambda extra: abstract(states[extra["size"]]))
    assert restored.step == 1 and restored.skipped == ((2, "worn"),)
    assert_same_bits(restored.state, states[4])
    with pytest.raises(ValueError, match="'w' has no sharding"):
        restore(tmp_path, lambda extra: {"w": jax.ShapeDtypeStruct((extra["size"],), np.float32)})


def test_keeps_the_newest_and_replaces_a_given_up_future(workdir, three_saves):
    states = three_saves[1]
    (workdir / "checkpoints" / "30" / "state" / "_METADATA").unlink()
    (workdir / "checkpoints" / "35.saving.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "notes").mkdir()
    with Checkpointer(workdir, keep=2) as c:
        assert c.restore(abstract(states[10])).step == 20
        c.save(25, states[10], {})
        c.wait()
        assert c.steps() == [20, 25, 30]  # 30 belongs to a future that was given up
        c.save(30, states[20], {})
        c.wait()
        assert c.steps() == [25, 30]
        assert_same_bits(c.restore(abstract(states[10])).state, states[20])
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["25", "30", "notes"]


def test_due_and_bad_arguments(tmp_path):
    c = Checkpointer(tmp_path, every=5)
    assert [s for s in range(16) if c.due(s)] == [5, 10, 15]
    for bad in ({"keep": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=r"is 0; it must be >= 1"):
            Checkpointer(tmp_path, **bad)


# ---- damage ----


CASES = [(kind, n) for kind in DAMAGES for n in range(8 if kind == "flip" else 2)]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_damage_falls_back_to_the_older_step_and_names_the_file(workdir, three_saves, kind, seed):
    damaged = DAMAGES[kind](workdir / "checkpoints" / "30", random.Random(f"{kind} {seed}"))
    restored = restore(workdir, abstract(three_saves[1][10]))
    assert restored.step == restored.extra["step"] == 20
    assert_same_bits(restored.state, three_saves[1][20])
    [(step, reason)] = restored.skipped
    assert step == 30 and any(name in reason for name in damaged), (damaged, reason)


def test_without_file_hashes_the_array_checksums_decide(tmp_path):
    """Above hash_limit no file has a SHA-256, and Orbax alone loads a flipped byte of a large array silently."""
    state = place({"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}, mesh((1, 1)))
    with Checkpointer(tmp_path, hash_limit=0) as c:
        c.save(1, state, {})
        c.save(2, state, {})
    victim = max(files(tmp_path / "checkpoints" / "2" / "state"), key=lambda p: p.stat().st_size)
    intact, reasons = victim.read_bytes(), []
    for seed in range(12):
        rng, data = random.Random(seed), bytearray(intact)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        restored = restore(tmp_path, abstract(state))
        assert_same_bits(restored.state, state)
        reasons += [reason for _, reason in restored.skipped]
    assert "array w differs from its checksum" in reasons


def test_a_wrong_array_is_named(tmp_path):
    """The manifest of one state over the intact files of another: only the array checksums can tell."""
    a, b = make_state(1), make_state(2)
    for name, state in (("a", a), ("b", b)):
        with Checkpointer(tmp_path / name, hash_limit=0) as c:
            c.save(1, state, {})
    step = tmp_path / "a" / "checkpoints" / "1"
    document = json.loads((step / manifest.NAME).read_text())
    other = json.loads((tmp_path / "b" / "checkpoints" / "1" / manifest.NAME).read_text())
    document["body"]["arrays"] = other["body"]["arrays"]
    manifest_body = document["body"]
    text = json.dumps(manifest_body, sort_keys=True, separators=(",", ":"))
    document["sha256"] = manifest.hashlib.sha256(text.encode()).hexdigest()
    (step / manifest.NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"step 1: array \S+ differs from its checksum"):
        restore(tmp_path / "a", abstract(a))


def test_stray_empty_folder_is_named_and_all_bad_is_an_error(workdir, three_saves):
    template = abstract(three_saves[1][10])
    (workdir / "checkpoints" / "40").mkdir()
    restored = restore(workdir, template)
    assert restored.step == 30 and restored.skipped == ((40, f"no {manifest.NAME}"),)
    for step in ("10", "20", "30"):
        (workdir / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("x")
    for call in (lambda c: c.restore(template), lambda c: c.latest()):
        with Checkpointer(workdir) as c, pytest.raises(CheckpointError) as e:
            call(c)
        for word in ("step 10", "step 20", "step 30", "step 40", "_CHECKPOINT_METADATA has 1 bytes"):
            assert word in str(e.value)


# ---- what does not fit ----


def test_mismatch_names_path_wanted_and_found(three_saves):
    workdir, states = three_saves
    template = abstract(states[30])
    s = template["rng"].sharding
    template["params"]["layer"]["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32, sharding=s)
    template["params"]["layer"]["b"] = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=s)
    template["params"]["more"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=s)
    del template["rng"]
    with pytest.raises(CheckpointError) as e:
        restore(workdir, template)
    for row in (
        "params/layer/w: wanted float32 (16, 9), found float32 (16, 8)",
        "params/layer/b: wanted float32 (8,), found bfloat16 (8,)",
        "params/more: wanted int32 (), found nothing",
        "rng: wanted nothing, found uint32 (2,)",
    ):
        assert row in str(e.value)
    assert len(str(e.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.int64(3), r"'x/y' is a numpy.int64"),
        (3, r"'x/y' is a builtins.int"),
        (np.zeros(2), r"'x/y' is a numpy.ndarray"),
        (jax.random.key(0), "key_data"),
        (jnp.zeros(2, jnp.int4), "int4"),
    ],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, message):
    with Checkpointer(tmp_path) as c, pytest.raises(TypeError, match=message):
        c.save(1, {"x": {"y": leaf}}, {})
    assert not (tmp_path / "checkpoints").exists()


def test_paths_that_clash_on_disk(tmp_path):
    x = jnp.zeros(2)
    for tree in ({"a": {"b": x}, "a.b": x}, {"a": {"b": x}, "a/b": x}, {"a": x, "a/b": x}):
        with Checkpointer(tmp_path) as c, pytest.raises(ValueError, match="rename one"):
            c.save(1, tree, {})


def test_extra_must_be_json(tmp_path):
    for extra in ({"a": np.zeros(2)}, {"a": float("nan")}):
        with Checkpointer(tmp_path) as c, pytest.raises(TypeError, match="not JSON"):
            c.save(1, {"x": jnp.zeros(2)}, extra)


def test_template_needs_shardings(workdir):
    with pytest.raises(ValueError, match="'x' has no sharding"):
        restore(workdir, {"x": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_failed_save_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        with Checkpointer(tmp_path) as c:
            c.save(1, {"x": jnp.zeros(2)}, {})


def test_a_failure_in_the_background_reaches_wait(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    c = Checkpointer(tmp_path)
    c.save(1, {"x": jnp.zeros(2)}, {})
    c.wait()
    monkeypatch.setattr(manifest, "write", full)
    c.save(2, {"x": jnp.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"step 2 was not saved.*No space left"):
        c.wait()
    monkeypatch.undo()
    assert c.steps() == [1] and float(c.restore({"x": jnp.zeros(2)}).state["x"][0]) == 0
    c.save(3, {"x": jnp.ones(2)}, {})
    c.close()
    assert c.steps() == [1, 3]


def test_arrays_are_read_singly(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.wait()
        found = checkpoints.read(3, ["params/layer/w", "frozen/index"])
        assert list(found) == ["params/layer/w", "frozen/index"]
        for name, leaf in zip(found, (state["params"]["layer"]["w"], state["frozen"]["index"])):
            assert found[name].dtype == leaf.dtype and np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()
            assert len(found[name].devices()) == 1
        assert checkpoints.read(3, ["empty"])["empty"].shape == (0, 4)
        with pytest.raises(CheckpointError, match=r"3 has no array 'params/layer/v'"):
            checkpoints.read(3, ["params/layer/v"])
        with pytest.raises(CheckpointError, match=r"checkpoints/4: not a folder"):
            checkpoints.read(4, ["params/layer/w"])


def test_an_array_read_singly_is_checked(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        checkpoints.wait()
        folder = tmp_path / "checkpoints" / "1"
        document = json.loads((folder / manifest.NAME).read_text())
        arrays = document["body"]["arrays"]
        for array in arrays.values():
            array["checksum"] = array["checksum"][::-1]
        body = manifest._canonical(document["body"])
        document["sha256"] = hashlib.sha256(body.encode()).hexdigest()
        (folder / manifest.NAME).write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match="array params/layer/w differs from its checksum"):
            checkpoints.read(1, ["params/layer/w"])
