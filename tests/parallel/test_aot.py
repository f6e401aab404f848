"""The training step compiled for TPU topologies on this machine."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from structmat.parallel import (
    MeshError,
    bytes_per_device,
    compile_for,
    describe,
    differences,
    make_mesh,
    on_mesh,
    plan,
    topology_mesh,
    traffic,
)
from structmat.training.build import compile_step, optimizer_for
from structmat.training.config import default, validate
from structmat.training.state import plan_state
from structmat.training.step import make_step

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def test_missing_libtpu_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeshError, match=r"compiling for v5e:2x4 needs libtpu.*structmat\[tpu\]"):
        topology_mesh("v5e:2x4")


def test_account_of_a_known_program():
    mesh = make_mesh({"data": 2, "tensor": 4})
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=place("data", "tensor"))
    w = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=place("tensor", None))
    program = compile_for(
        mesh, lambda x, w: (x @ w, x + 1), x, w, out_shardings=(place("data"), place("data", "tensor"))
    )
    assert (program.device, program.devices) == ("cpu", 8)
    assert program.argument_bytes == 4 * (32 * 32 + 32 * 32)
    assert program.flops >= 2 * 32 * 32 * 32  # of one device's part
    assert program.collectives["all-reduce"].bytes == 4 * 32 * 32
    donated = compile_for(mesh, lambda x: x + 1, x, out_shardings=x.sharding, donate_argnums=(0,))
    assert donated.alias_bytes == 4 * 32 * 32 and donated.bytes < donated.argument_bytes + donated.output_bytes
    with pytest.raises(ValueError, match="jitted already"):
        compile_for(mesh, jax.jit(lambda x: x), x, donate_argnums=(0,))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3", "nonsense"])
def test_unknown_topology(name):
    with pytest.raises(MeshError, match=f"topology '{name}'.*names that work: .*v5e:2x4"):
        topology_mesh(name)


@pytest.mark.tpu_aot
def test_meshes_of_topologies():
    assert dict(topology_mesh("v5e:16x16", {"data": 8, "fsdp": 8, "tensor": 4}).shape) == {
        "data": 8,
        "fsdp": 8,
        "tensor": 4,
    }
    assert topology_mesh("v5p:8x8x8", {"data": 2, "fsdp": 128, "tensor": 2}).size == 512
    with pytest.raises(MeshError, match="its product is 6"):
        topology_mesh("v5e:2x4", {"data": 3, "fsdp": 2})


@pytest.mark.tpu_aot
def test_only_data_crosses_slices():
    mesh = topology_mesh("v5e:2x4", {"data": 4, "fsdp": 4}, num_slices=2)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(MeshError, match="data=1 must be a multiple of the 2 slices; nearest valid: 2x8x1 "):
        topology_mesh("v5e:2x4", {"fsdp": -1}, num_slices=2)


@pytest.mark.tpu_aot
def test_only_replica_crosses_slices():
    mesh = topology_mesh("v5e:2x4", {"replica": 4, "data": 2, "fsdp": -1}, num_slices=2)
    assert mesh.devices.shape == (4, 2, 2, 1)
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    for replica, words in (
        (3, "replica=3 must be a multiple of the 6 slices; nearest valid: 6x1x4x1 "),
        (1, "data=1 must"),
    ):
        with pytest.raises(MeshError, match=words):
            topology_mesh("v5e:2x2", {"replica": replica, "fsdp": -1}, num_slices=6)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("structure", "layers", "most"), [("dense()", 2, 1.1), ("random_sparse(density=0.1)", 1, 3)])
def test_only_gradients_cross_slices(structure, layers, most):
    """Of itself the compiler sends the embedding and weights that are scattered from slice to slice as well."""
    mesh = topology_mesh("v5e:2x2", {"replica": 2, "fsdp": 2, "tensor": 2}, num_slices=2)
    program, planned = step_for(mesh, structure, layers)
    found = traffic(program.compiled.as_text(), mesh)
    (across,) = [s for s in found if s.dcn]
    assert (across.kind, across.axes, across.parts) == ("all-reduce", ("replica",), 2)
    assert not any("replica" in s.axes for s in found if not s.dcn)
    held = planned / 3  # of parameters and two moments
    assert 0.9 * held < across.bytes < most * held  # in the parts a chip holds; where a product is dense, dense


def step_for(mesh, structure, layers=2):
    config = default("lm")
    config.update(steps=8, batch=16, structure=structure)
    config.model.update(width=256, heads=4, layers=layers)
    config.mesh.update(mesh.shape)
    task = validate(config, mesh.size)
    tx, schedule = optimizer_for(config, task)
    template = plan_state(task, tx, None, mesh)
    with on_mesh(mesh):
        compiled = compile_step(task, make_step(task, tx, None, schedule, 0), template, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, template)
    assert differences(template, places, compiled.output_shardings[0]) == []
    return describe(compiled, mesh), bytes_per_device(plan(template, places))


@pytest.mark.tpu_aot
def test_training_step_on_v5e():
    mesh = topology_mesh("v5e:2x4", CUBE)
    dense, dense_plan = step_for(mesh, "dense()")
    small, small_plan = step_for(mesh, "monarch(blocks=8, order='blocked')")
    for program, planned in ((dense, dense_plan), (small, small_plan)):
        assert (program.device, program.devices) == ("TPU v5 lite", 8)
        assert planned <= program.argument_bytes < program.bytes < 16 * 2**30
        assert program.alias_bytes >= planned  # the state is donated whole
        assert "all-reduce" in program.collectives
    assert small_plan < 0.6 * dense_plan and small.argument_bytes < dense.argument_bytes
    assert small.flops < dense.flops
