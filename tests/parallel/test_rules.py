"""Logical axes to shardings: of variables, state and batches."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from structmat.models import GPT
from structmat.nn import assign
from structmat.parallel import (
    DEFAULT_RULES,
    MeshError,
    batch_sharding,
    differences,
    local_rows,
    make_mesh,
    on_mesh,
    plan,
    replicated,
    shard_batch,
    shardings,
    spec_for,
    state_shardings,
    unbox,
)

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
REPLICAS = {"replica": 2, "data": 2, "fsdp": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (4, 8), P("fsdp", "tensor")),
        (("vocab", "embed"), (4, 8), P("tensor", "fsdp")),
        (("batch", "length", None), (8, 3, 5), P(("data", "fsdp"), None, None)),
        (("embed", "block_in", "mlp", "rank"), (2, 3, 2, 5), P("fsdp", None, "tensor", None)),
        (("embed", "embed"), (4, 4), P("fsdp", None)),  # no mesh axis twice
        (("mlp", "heads"), (4, 4), P("tensor", None)),
        (("batch", "embed"), (4, 4), P(("data", "fsdp"), None)),
        ((), (), P()),
    ],
)
def test_spec(axes, shape, spec):
    assert spec_for(make_mesh(CUBE), axes, shape) == spec


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("batch", "length"), (8, 3), P(("replica", "data", "fsdp"), None)),
        (("batch",), (4,), P(("replica", "data"))),
        (("embed", "mlp"), (4, 8), P("fsdp", "tensor")),
        (("layers", None), (2, 2**18), P(None, "fsdp")),  # storage is shared within a replica
    ],
)
def test_only_batches_are_split_over_replicas(axes, shape, spec):
    assert spec_for(make_mesh(REPLICAS), axes, shape) == spec


@pytest.mark.parametrize(("wanted", "spec"), [("replica", P(None)), (("replica", "fsdp"), P("fsdp"))])
def test_rules_hold_on_a_mesh_without_replicas(wanted, spec):
    assert spec_for(make_mesh(CUBE), ("embed",), (4,), (("embed", wanted),)) == spec
    assert batch_sharding(make_mesh(CUBE), (("batch", wanted),)).spec == spec


@pytest.mark.parametrize(
    ("axes", "shape", "spec", "whole"),
    [
        (("embed", "mlp"), (3, 8), P(None, "tensor"), "('fsdp',)"),
        (("batch",), (6,), P("data"), "('fsdp',)"),
        (("batch",), (5,), P(None), "('data', 'fsdp')"),
    ],
)
def test_indivisible_is_left_whole_and_logged(caplog, axes, shape, spec, whole):
    with caplog.at_level(logging.WARNING):
        assert spec_for(make_mesh(CUBE), axes, shape, path="mlp/up/kernel") == spec
    (line,) = caplog.messages
    assert "mlp/up/kernel" in line and str(shape) in line and f"kept whole on {whole}" in line
    assert repr(axes[0]) in line


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("rank", "mlp"), (512, 1024), P("fsdp", "tensor")),
        (("rank", "mlp"), (511, 1024), P(None, ("tensor", "fsdp"))),
        (("layers", "rank", "mlp"), (2, 511, 1024), P(None, None, ("tensor", "fsdp"))),
        (("embed", "block_in", "mlp", "rank"), (7, 1024, 8, 64), P(None, "fsdp", "tensor", None)),
        (("terms", None, None), (99, 64, 128), P(None, None, "fsdp")),
        (("rank", "mlp"), (511, 1026), P(None, "tensor")),  # no dimension is divisible once more
        (("layers", "rank"), (2**18, 3), P(None, None)),
        (("rank", "mlp"), (8, 1024), P(None, "tensor")),  # small
    ],
)
def test_large_leaves_are_split_for_storage(axes, shape, spec):
    assert spec_for(make_mesh(CUBE), axes, shape) == spec


@pytest.mark.parametrize(("shape", "said"), [((511, 1026), 1), ((512, 1024), 0), ((3, 5), 0)])
def test_a_large_leaf_that_stays_whole_is_told(caplog, shape, said):
    with caplog.at_level(logging.WARNING):
        spec_for(make_mesh(CUBE), ("rank", "mlp" if shape[1] % 2 == 0 else None), shape, path="up/b")
    assert len(caplog.messages) == said and all(
        f"up/b: no dimension of shape {shape} divides by fsdp=2" in line for line in caplog.messages
    )


def test_an_fsdp_axis_of_one_device_splits_nothing():
    assert spec_for(make_mesh({"data": 4, "tensor": 2}), ("rank", "mlp"), (512, 1024)) == P(None, "tensor")


def test_fallback_entries_are_taken_in_order():
    rules = (("embed", "fsdp"), ("mlp", "fsdp"), ("mlp", "tensor"))
    mesh = make_mesh(CUBE)
    assert spec_for(mesh, ("embed", "mlp"), (4, 4), rules) == P("fsdp", "tensor")
    assert spec_for(mesh, ("mlp", "embed"), (4, 4), rules) == P("fsdp", None)


@pytest.mark.parametrize(
    ("axes", "shape", "rules", "words"),
    [
        (("embde",), (4,), DEFAULT_RULES, "a/b: no rule for logical axis 'embde'; did you mean 'embed'"),
        (("embed",), (4, 4), DEFAULT_RULES, r"a/b: logical axes \('embed',\) do not match shape \(4, 4\)"),
        (("embed",), (4,), (("embed", "fsdq"),), "rule 'embed' -> 'fsdq'.*did you mean 'fsdp'"),
        (("embed",), (4,), (("batch", ("replica", "fsdq")),), "rule 'batch' -> 'fsdq'.*did you mean 'fsdp'"),
    ],
)
def test_impossible_is_an_error(axes, shape, rules, words):
    with pytest.raises(MeshError, match=words):
        spec_for(make_mesh(CUBE), axes, shape, rules, "a/b")


def small_gpt(structure):
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    model = assign(GPT(vocab=16, context=8, width=16, heads=2), structure, tokens)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)


def test_variables_and_state_of_a_scanned_gpt():
    mesh = make_mesh(CUBE)
    boxed = small_gpt("low_rank(rank=4)")
    places = shardings(mesh, boxed)
    plain = unbox(boxed)
    assert jax.tree.structure(places) == jax.tree.structure(plain)
    params = places["params"]
    assert params["layers_0to1"]["mlp"]["up"]["b"].spec == P(None, None, "tensor")
    assert params["layers_0to1"]["mlp"]["down"]["b"].spec == P(None, None, "fsdp")
    assert params["head"]["kernel"].spec == P("fsdp", "tensor")
    assert params["norm"]["scale"].spec == P(None)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
        "params": plain["params"],
        "opt_state": jax.eval_shape(tx.init, plain["params"]),
    }
    got = state_shardings(mesh, places, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert all(isinstance(s, NamedSharding) and s.mesh == mesh for s in jax.tree.leaves(got))
    adam = got["opt_state"][1][0]
    assert adam.mu == params and adam.nu == params and got["params"] == params
    assert adam.count.spec == got["step"].spec == got["key"].spec == P()
    assert state_shardings(mesh, params, state) == got  # one collection will do


def test_factored_moments_do_not_follow():
    mesh = make_mesh(CUBE)
    params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    places = {"w": NamedSharding(mesh, P("fsdp", "tensor"))}
    state = jax.eval_shape(optax.scale_by_factored_rms().init, params)
    got = state_shardings(mesh, places, state)
    assert got.v_row["w"].spec == got.v_col["w"].spec == got.v["w"].spec == P(None)


def test_frozen_leaves_keep_their_axes():
    mesh = make_mesh(CUBE)
    boxed = small_gpt("frozen(dense()) + low_rank(rank=4)")
    places = shardings(mesh, boxed)
    up = places["frozen"]["layers_0to1"]["mlp"]["up"]
    assert jax.tree.leaves(up)[0].spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(("spec", "rows"), [(CUBE, 2), (REPLICAS, 1), ({"replica": 2, "tensor": 4}, 4)])
def test_shard_batch_round_trip(spec, rows):
    mesh = make_mesh(spec)
    batch = {"x": np.arange(24, dtype=np.float32).reshape(8, 3), "label": np.arange(8)}
    got = shard_batch(mesh, batch, 8)
    for name, value in batch.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].sharding.is_equivalent_to(batch_sharding(mesh), value.ndim)
        assert {s.data.shape[0] for s in got[name].addressable_shards} == {rows}
    assert local_rows(mesh, 8) == range(8)


@pytest.mark.parametrize(
    ("value", "total", "words"),
    [
        (np.zeros((6, 2)), None, "batch of 6 rows cannot be spread over 4 devices; nearest valid: 4, 8"),
        (np.zeros((4, 2)), 8, r"batch\['x'\] has 4 rows, but this process holds rows 0 to 7 of 8"),
        (np.zeros(()), None, r"batch\['x'\] is a scalar"),
        (np.zeros((0, 2)), None, "batch of 0 rows"),
    ],
)
def test_bad_batches(value, total, words):
    with pytest.raises(MeshError, match=words):
        shard_batch(make_mesh(CUBE), {"x": value}, total)


def test_a_batch_is_divided_among_replicas_too():
    with pytest.raises(MeshError, match="batch of 12 rows cannot be spread over 8 devices; nearest valid: 8, 16"):
        local_rows(make_mesh(REPLICAS), 12)


@pytest.mark.parametrize("first", ["data", "replica"])
def test_logical_constraint_acts_only_on_the_mesh(first):
    mesh = make_mesh({first: 2, "tensor": 4})
    kernel = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P(None, "tensor")))
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P()))
    step = lambda x, w: nn.with_logical_constraint(x @ w, ("batch", "mlp"))
    without = jax.jit(step).lower(x, kernel).compile().output_shardings
    with on_mesh(mesh):
        within = jax.jit(lambda x, w: step(x, w)).lower(x, kernel).compile().output_shardings
    assert without.is_equivalent_to(NamedSharding(mesh, P(None, "tensor")), 2)
    assert within.is_equivalent_to(NamedSharding(mesh, P(first, "tensor")), 2)


def test_on_mesh_refuses_rules_it_cannot_follow():
    with pytest.raises(MeshError, match="no such mesh axis"), on_mesh(make_mesh(), (("batch", "rows"),)):
        pass


def test_differences_names_the_leaf():
    mesh = make_mesh(CUBE)
    abstract = {"w": jax.ShapeDtypeStruct((4, 4), jnp.float32), "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
    planned = {"w": NamedSharding(mesh, P("fsdp", None)), "b": NamedSharding(mesh, P(None))}
    compiled = {"w": NamedSharding(mesh, P()), "b": NamedSharding(mesh, P())}
    (line,) = differences(abstract, planned, compiled)
    assert line.startswith("w (4, 4): planned") and "fsdp" in line


def test_replicated_lists_large_whole_leaves():
    mesh = make_mesh(CUBE)
    abstract = {name: jax.ShapeDtypeStruct((1024, 512), jnp.float32) for name in ("whole", "split")}
    abstract["small"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    specs = {"whole": P(None, None), "split": P("fsdp", None), "small": P(None)}
    leaves = plan(abstract, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    assert [leaf.path for leaf in replicated(leaves)] == ["whole"]
    assert [leaf.path for leaf in replicated(leaves, over=2**21)] == []
    assert [leaf.path for leaf in replicated(leaves, over=2**20)] == ["whole"]
