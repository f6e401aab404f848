"""Matrices in files: names, stacks, what is left out, and nothing read before it is asked for."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from structmat import StructureError
from structmat.analysis.weight_files import file_weights
from structmat.data.errors import DataError

RNG = np.random.default_rng(0)
UP, STACK = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 5, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mlp").mkdir()
    np.save(tmp_path / "mlp" / "up.npy", UP)
    np.save(tmp_path / "layers.npy", STACK)
    np.save(tmp_path / "bias.npy", UP[0])
    np.save(tmp_path / "ids.npy", np.arange(6).reshape(2, 3))
    (tmp_path / "notes.txt").write_text("no weights")
    return tmp_path


def test_npy_names_stacks_and_what_is_left_out(folder):
    found = file_weights(folder)
    assert list(found.readers) == ["layers/0", "layers/1", "layers/2", "mlp/up"]
    assert found.left_out == ("bias: shape (6,)", "ids: shape (2, 3), not of floats")
    np.testing.assert_array_equal(found.readers["mlp/up"](), UP)
    np.testing.assert_array_equal(found.readers["layers/1"](), STACK[1])
    assert not isinstance(found.readers["layers/1"](), np.memmap)
    np.testing.assert_array_equal(file_weights(folder, transpose=True).readers["layers/2"](), STACK[2].T)
    assert list(file_weights(folder, "layers/[01]").readers) == ["layers/0", "layers/1"]
    assert list(file_weights(folder / "mlp" / "up.npy").readers) == ["up"]


def test_values_are_read_when_asked_for(folder):
    reader = file_weights(folder).readers["mlp/up"]
    np.save(folder / "mlp" / "up.npy", 2 * UP)
    np.testing.assert_array_equal(reader(), 2 * UP)


def test_refusals(folder, tmp_path, monkeypatch):
    with pytest.raises(StructureError, match="'mlp/dwn' matches no path; near: mlp/up"):
        file_weights(folder, "mlp/dwn")
    with pytest.raises(DataError, match=r"is or holds no \.npy or \.safetensors file"):
        file_weights(tmp_path / "none")
    (folder / "mlp" / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.npy is not a readable \.npy file of numbers"):
        file_weights(folder)
    (folder / "mlp" / "bad.npy").unlink()
    with pytest.raises(DataError, match=r"holds no matrix of floats, only bias: shape \(6,\)"):
        file_weights(folder / "bias.npy")
    (folder / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(DataError, match=r"needs the library safetensors: pip install 'structmat\[safetensors\]'"):
        file_weights(folder)


def test_safetensors(folder):
    save = pytest.importorskip("safetensors.flax").save_file
    half = jnp.asarray(RNG.normal(size=(8, 4)), jnp.bfloat16)
    save({"model.q.weight": half, "experts": jnp.asarray(STACK), "norm": jnp.ones(4)}, folder / "model.safetensors")
    found = file_weights(folder)
    assert {"model.q.weight", "experts/0", "experts/2", "mlp/up"} <= set(found.readers) and len(found.readers) == 8
    assert "norm: shape (4,)" in found.left_out
    read = found.readers["model.q.weight"]()
    assert read.dtype == jnp.bfloat16
    np.testing.assert_array_equal(read, np.asarray(half))
    np.testing.assert_array_equal(found.readers["experts/2"](), STACK[2])
    save({"experts": jnp.asarray(STACK)}, folder / "other.safetensors")
    with pytest.raises(DataError, match="'experts/0' is in more than one file"):
        file_weights(folder)
    (folder / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"other\.safetensors is not a readable \.safetensors file"):
        file_weights(folder)
