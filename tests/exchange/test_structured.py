"""Any model as safetensors and JSON: every kind of leaf, bit by bit, and what is wrong is named."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.data.errors import DataError
from structmat.exchange import load_safetensors, open_folder, save_safetensors
from structmat.exchange.tensor_files import TensorWriter, tensors_in
from structmat.models import GPT
from structmat.nn import assign, sites
from structmat.surgery import by_layer
from structmat.surgery.layers import named

safetensors = pytest.importorskip("safetensors.numpy")
EXAMPLE = jax.ShapeDtypeStruct((1, 8), jnp.int32)
RULES = (
    "layers_[012]/mlp/up -> low_rank(rank=2) + random_sparse(density=0.25); layers_3/mlp/up -> "
    "quantized(bits=4, group=4); layers_3/attn/o -> masked(dense(), n_m_sparse(2, 4)); layers_3/attn/k -> "
    "frozen(dense()) + low_rank(rank=1)"
)


@pytest.fixture(scope="module")
def model():
    return assign(GPT(vocab=16, context=8, layers=4, width=8, heads=2), RULES, EXAMPLE)


def filled(tree):
    """Every leaf drawn anew within its dtype, with a complex and a bfloat16 one beside."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == jnp.bool_:
            return jnp.asarray(rng.random(leaf.shape) > 0.5)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 100, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


@pytest.fixture(scope="module")
def variables(model):
    return filled(nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))


@pytest.fixture
def saved(model, variables, tmp_path):
    save_safetensors(tmp_path / "saved", variables, sites(model, EXAMPLE), {"task": "lm"})
    return tmp_path / "saved"


def equal(a, b):
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(same, a, b)))


def test_the_same_bits_in_the_same_groups(saved, model, variables):
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(variables)}
    assert {"float32", "int32", "uint8"} <= dtypes and "layers_0to2" in variables["params"]
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    found = load_safetensors(saved, like)
    assert equal(found.variables, variables) and found.config == {"task": "lm"}
    single = named(load_safetensors(saved).variables)
    pieces = {path: array if i is None else array[i] for path, (array, i) in by_layer(variables).items()}
    assert "params/layers_1/mlp/up/bias" in single and set(single) == set(pieces)
    assert all(equal(single[path], pieces[path]) for path in pieces), "layers singly, for a model with scan=False"


def test_names_are_of_layers_and_structures_canonical(saved, model):
    held = open_folder(saved)
    assert "layers_2/mlp/up/0/a" in held.arrays and not any("to2" in name for name in held.arrays)
    assert held.arrays["layers_3/attn/k/0/kernel"]["collection"] == "frozen"
    table = sites(model, EXAMPLE)
    assert {p: r["structure"] for p, r in held.sites.items()} == {p: str(s.bound.structure) for p, s in table.items()}
    assert set(safetensors.load_file(saved / "weights.safetensors")) == set(held.arrays), "the library reads it"
    assert held.versions["jax"] == jax.__version__


@pytest.mark.parametrize("dtype", ["complex64", "bfloat16", "float16", "int8", "uint8", "bool", "float32"])
def test_every_dtype(tmp_path, dtype):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(3, 4, 5)) * 20
    value = jnp.asarray(real + 1j * rng.normal(size=real.shape) if dtype == "complex64" else real).astype(dtype)
    tree = {"params": {"layers_0to2": {"w": value}, "scalar": value[0, 0, 0], "none": value[:0]}}
    save_safetensors(tmp_path / "x", tree, {})
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    assert equal(load_safetensors(tmp_path / "x", shapes).variables["params"], tree["params"])
    stored = tensors_in(tmp_path / "x/weights.safetensors")["layers_1/w"]
    assert stored.shape == ((4, 5, 2) if dtype == "complex64" else (4, 5))
    assert stored.dtype == ("float32" if dtype == "complex64" else dtype)


def test_what_is_missing_extra_or_other_is_named(saved, model):
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    params = dict(like["params"])
    params["norm"] = {"scale": jax.ShapeDtypeStruct((9,), jnp.float32), "shift": params["norm"]["bias"]}
    with pytest.raises(DataError) as error:
        load_safetensors(saved, {**like, "params": params})
    text = str(error.value)
    assert "does not hold this model" in text
    assert "missing: params/norm/shift float32 (8,)" in text and "extra: params/norm/bias float32 (8,)" in text
    assert "other: params/norm/scale is float32 (8,), not float32 (9,)" in text


def test_damage_is_found(saved):
    index, weights = saved / "structmat.json", saved / "weights.safetensors"
    body, whole = json.loads(index.read_text()), weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(DataError, match=r"array '.*' differs from its SHA-256"):
        load_safetensors(saved)
    weights.write_bytes(whole)
    cut = {**body, "arrays": {n: a for n, a in body["arrays"].items() if n != "norm/scale"}}
    index.write_text(json.dumps(cut))
    with pytest.raises(DataError, match=r"extra: norm/scale float32 \(8,\)"):
        open_folder(saved)
    index.write_text(json.dumps({**body, "schema": 2}))
    with pytest.raises(DataError, match="has schema 2; this version reads 1"):
        open_folder(saved)
    index.write_text("{")
    with pytest.raises(DataError, match="is not readable"):
        open_folder(saved)
    index.unlink()
    with pytest.raises(DataError, match=r"has no structmat.json"):
        load_safetensors(saved)


def test_what_cannot_be_saved(saved, model, variables, tmp_path):
    with pytest.raises(DataError, match=r"is not empty \(it holds structmat.json, weights.safetensors\)"):
        save_safetensors(saved, variables, sites(model, EXAMPLE))
    with pytest.raises(DataError, match="collection 'cache' cannot be saved; valid: params, frozen, batch_stats"):
        save_safetensors(tmp_path / "x", {"cache": {"a": jnp.ones(2)}}, {})
    with pytest.raises(DataError, match="array 'a' has dtype float8_e5m2"):
        save_safetensors(tmp_path / "y", {"params": {"a": jnp.ones(2, jnp.float8_e5m2)}}, {})


def test_tensors_are_written_in_parts_and_any_order(tmp_path):
    about = {"a": ((2, 6), "float16"), "b": ((3,), "float32"), "c": ((), "int8"), "d": ((0, 2), "float32")}
    writer = TensorWriter(tmp_path / "x.safetensors", about, {"format": "pt"})
    whole = np.arange(12, dtype=np.float32).reshape(2, 6)
    writer.write("b", np.array([1.5, 2, 3]))
    for part in (slice(4, 6), slice(0, 4)):
        writer.write("a", whole[:, part], ..., part)
    writer.write("c", np.int8(7))
    with pytest.raises(ValueError, match=r"a: an array of shape \(2, 5\)"):
        writer.write("a", whole[:, :5])
    assert not (tmp_path / "x.safetensors").exists(), "no half file under its name"
    writer.finish()
    found = safetensors.load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a"], whole.astype(np.float16))
    assert found["b"].tolist() == [1.5, 2, 3] and found["c"] == 7 and found["d"].shape == (0, 2)
    tensor = tensors_in(tmp_path)["a"]
    np.testing.assert_array_equal(tensor.read(slice(None), slice(2, 4)), whole[:, 2:4].astype(np.float16))
