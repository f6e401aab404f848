"""Checkpoints written from files: read like any other, with the same checksums, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.exchange import from_disk
from structmat.optim import OPTIMIZERS, make_optimizer
from structmat.training import checksum
from structmat.training.checkpoint import Checkpointer, CheckpointError, nest

RNG = np.random.default_rng(0)
ARRAYS = {
    "params/w": RNG.normal(size=(3, 40, 7)).astype(np.float32),
    "params/z": (RNG.normal(size=(5, 6)) + 1j * RNG.normal(size=(5, 6))).astype(np.complex64),
    "params/half": RNG.normal(size=(9, 3)).astype(jnp.bfloat16),
    "frozen/index": RNG.integers(0, 99, (4, 5)).astype(np.int32),
    "frozen/mask": RNG.random((4, 5)) > 0.5,
    "frozen/codes": RNG.integers(0, 255, 33).astype(np.uint8),
    "opt_state/mu": np.broadcast_to(np.zeros((), np.float32), (3, 40, 7)),
    "opt_state/nu": np.broadcast_to(np.zeros((), np.complex64), (5, 6)),
    "opt_state/none": np.zeros((0, 3), np.float32),
    "step": np.array(7, np.int32),
}


def test_checksums_are_those_of_checkpoints(monkeypatch):
    monkeypatch.setattr(from_disk, "_WORDS", 37)
    from_disk._of_zeros.cache_clear()
    on_device = {name: jnp.asarray(value) for name, value in ARRAYS.items() if value.size}
    wanted = checksum.finish(list(on_device), checksum.start(on_device))
    assert {name: from_disk.checksum_of(ARRAYS[name]) for name in wanted} == wanted


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(from_disk, "PIECE", 1 << 10)
    with from_disk.Spool(tmp_path / "spool") as spool:
        for name, value in ARRAYS.items():
            if name == "params/w":
                for i in (1, 0, 2):
                    spool.write(name, value[i], (i, 3))
            elif not name.startswith("opt_state"):
                spool.write(name, value)
        with pytest.raises(ValueError, match=r"params/w: float32 \(4, 40, 7\) after float32 \(3, 40, 7\)"):
            spool.write("params/w", ARRAYS["params/w"][0], (0, 4))
        mapped = spool.arrays()
        assert isinstance(mapped["params/w"], np.memmap) and "params/z" in spool
        from_disk.save(tmp_path, 0, {n: mapped.get(n, ARRAYS[n]) for n in ARRAYS}, {"config": {"a": (1, 2)}})
    assert not (tmp_path / "spool").exists()
    return tmp_path


def template():
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return nest({n: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype), sharding=place) for n, a in ARRAYS.items()})


def test_what_is_saved_is_restored_and_read_singly(saved):
    with Checkpointer(str(saved)) as checkpoints:
        found = checkpoints.restore(template())
        assert found.step == 0 and found.extra == {"config": {"a": [1, 2]}} and not found.skipped
        for name, value in ARRAYS.items():
            collection, _, last = name.partition("/")
            own = found.state[collection][last] if last else found.state[collection]
            assert own.dtype == value.dtype and np.asarray(own).tobytes() == np.ascontiguousarray(value).tobytes(), name
        one = checkpoints.read(0, ["params/w"])["params/w"]
        np.testing.assert_array_equal(one, ARRAYS["params/w"])


def test_a_flipped_byte_is_found(saved):
    file = max((p for p in (saved / "checkpoints/0/state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Checkpointer(str(saved)) as checkpoints, pytest.raises(CheckpointError, match="differs from its SHA-256"):
        checkpoints.restore(template())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_begin_with_zeros(name):
    """Which is what a run made of other weights is given."""
    spec = dict(name=name, lr=1e-3, schedule="cosine", warmup=0, weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8, clip=1.0)
    params = {"w": jnp.ones((64, 80)), "z": jnp.ones(3, jnp.complex64)}
    mask = jax.tree.map(lambda _: True, params)
    state = make_optimizer(spec, None, mask, 10).init(params)
    least = 3 if name.startswith("sgd") else 4  # of SGD one average of each parameter, and the count
    assert len(jax.tree.leaves(state)) >= least
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
