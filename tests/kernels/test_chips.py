"""The chip a program is compiled for is that of the ambient mesh, and the figures are jax's own."""

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import CHIPS, chip_of, current_chip


def test_default_backend_without_a_mesh():
    assert current_chip() == CHIPS["cpu"] and CHIPS["cpu"].ridge == float("inf")


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x")]
)
def test_kinds(kind, name):
    assert chip_of(kind, "tpu") == CHIPS[name]


def test_unknown_chips_have_no_figures():
    chip = chip_of("TPU v99", "tpu")
    assert (chip.platform, chip.vmem, chip.ridge) == ("tpu", 0, float("inf"))
    assert chip_of("NVIDIA H100 80GB HBM3", "gpu") == CHIPS["h100"]


def test_two_cores_of_a_v4_as_one_device():
    one, two = chip_of("TPU v4", "tpu", 1), chip_of("TPU v4", "tpu", 2)
    assert (two.flops, two.cores, two.ridge) == (2 * one.flops, 2, one.ridge)


def test_figures_are_those_jax_knows():
    versions = {v.value: v for v in type(next(iter(_versions())))}
    for name, version in (("v4", "v4"), ("v5e", "v5e"), ("v5p", "v5p"), ("v6e", "v6e"), ("v7x", "7x")):
        chip = CHIPS[name]
        info = pltpu.get_tpu_info_for_chip(versions[version], 1)
        assert chip.flops == pytest.approx(chip.cores * info.bf16_ops_per_second, rel=0.01)
        assert chip.bandwidth == pytest.approx(chip.cores * info.mem_bw_bytes_per_second, rel=0.01)
        assert (chip.vmem, chip.lanes) == (info.vmem_capacity_bytes, info.mxu_column_size)


def _versions():
    import inspect

    annotation = inspect.signature(inspect.unwrap(pltpu.get_tpu_info_for_chip)).parameters["chip_version"].annotation
    return annotation if not isinstance(annotation, str) else pytest.skip("jax names the versions otherwise")


def test_bound_of_a_square_layer():
    assert CHIPS["v5e"].bound(4096, 4096) == pytest.approx(4096 / (2 * 197e12 / 820e9))


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "name"),
    [("v4:2x2x1", "v4"), ("v5e:2x4", "v5e"), ("v5p:2x2x1", "v5p"), ("v6e:2x4", "v6e"), ("tpu7x:2x2x1", "v7x")],
)
def test_the_ambient_mesh_decides(topology, name):
    from structmat.parallel import topology_mesh

    mesh = topology_mesh(topology)
    seen = []
    with jax.set_mesh(mesh):
        jax.jit(lambda x: (seen.append(current_chip()), x)[1]).lower(np.ones(8, np.float32))
    expected = chip_of("TPU v4", "tpu", 2) if name == "v4" else CHIPS[name]
    assert seen == [expected]
