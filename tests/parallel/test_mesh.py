"""Meshes use every device or say what would."""

import itertools
import math
import re

import jax
import pytest
from jax.sharding import AxisType

from structmat.parallel import AXES, MeshError, make_mesh
from structmat.parallel.mesh import factorisations, mesh_shape


@pytest.mark.parametrize("replica", [1, 2])
def test_all_factorisations_of_1_to_8(replica):
    for count in range(1, 9):
        for shape in itertools.product((replica,), *[range(1, 9)] * 3):
            spec = dict(zip(AXES, shape))
            if math.prod(shape) == count:
                assert mesh_shape(spec, count) == shape
                continue
            with pytest.raises(MeshError) as error:
                mesh_shape(spec, count)
            text = str(error.value)
            offered = re.findall(r"[\dx]+ \((.+?)\)", text.split("nearest valid: ")[1])
            assert f"{shown(shape)} (" in text and f"number of devices, {count}," in text
            assert offered and all(math.prod(map(int, re.findall(r"=(\d+)", o))) == count for o in offered)
            assert replica > 1 or not any("replica" in o for o in offered)


def shown(shape):
    """2x1x4 of (1, 2, 1, 4), 2x2x1x4 of (2, 2, 1, 4)."""
    return "x".join(map(str, shape[1:] if shape[0] == 1 else shape))


def test_factorisations_are_complete():
    assert sorted(factorisations(8)) == sorted(
        s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8
    )


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (None, (1, 8, 1, 1)),
        ({}, None),
        ({"fsdp": -1}, (1, 1, 8, 1)),
        ({"data": 2, "tensor": -1}, (1, 2, 1, 4)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (1, 2, 2, 2)),
        ({"data": 8, "tensor": -1}, (1, 8, 1, 1)),
        ({"replica": 2, "data": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"replica": -1, "fsdp": 2}, (4, 1, 2, 1)),
        ({"replica": -1, "data": 8}, (1, 8, 1, 1)),
    ],
)
def test_what_is_left(spec, shape):
    if shape is None:
        with pytest.raises(MeshError, match="its product is 1, not the number of devices, 8"):
            mesh_shape(spec, 8)
    else:
        assert mesh_shape(spec, 8) == shape


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"data": 3, "fsdp": 2}, "3x2x1.*nearest valid.*4x2x1"),
        ({"dat": 8}, "unknown axis 'dat'; did you mean 'data'"),
        ({"model": 8}, "unknown axis 'model'; valid: replica, data, fsdp, tensor"),
        ({"replicas": 8}, "unknown axis 'replicas'; did you mean 'replica'"),
        ({"replica": 0}, "replica=0 must be a positive int"),
        ({"replica": 3}, r"3x1x1x1 \(replica=3, data=1, .*nearest valid: .*4x1x1x2"),
        ({"replica": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"replica": -1, "data": 3}, "3 does not divide the number of devices, 8"),
        ({"data": 0}, "data=0 must be a positive int"),
        ({"tensor": -2}, "tensor=-2 must be"),
        ({"fsdp": 2.0}, "fsdp=2.0 must be"),
        ({"fsdp": True}, "fsdp=True must be"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"data": -1, "fsdp": 3}, "3 does not divide the number of devices, 8"),
        ({"data": -1, "tensor": 16}, "16 does not divide the number of devices, 8.*nearest valid: 1x1x8"),
    ],
)
def test_refused(spec, words):
    with pytest.raises(MeshError, match=words):
        make_mesh(spec)


def test_real_mesh_holds_every_device_once():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert mesh.axis_names == ("data", "fsdp", "tensor") and dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_replica_is_an_axis_only_where_there_are_several():
    mesh = make_mesh({"replica": 2, "data": -1, "tensor": 2})
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"replica": 2, "data": 2, "fsdp": 1, "tensor": 2}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())
    for spec in ({"replica": 1, "data": -1}, {"replica": -1, "data": 8}):
        assert make_mesh(spec) == make_mesh()


def test_some_devices():
    assert list(make_mesh(None, jax.devices()[2:5]).devices.flat) == jax.devices()[2:5]
    with pytest.raises(MeshError, match="its product is 8, not the number of devices, 3"):
        make_mesh({"data": 8}, jax.devices()[:3])
