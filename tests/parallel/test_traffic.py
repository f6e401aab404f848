"""Collectives by mesh axis, against programs whose collectives are known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import CHIPS
from structmat.parallel import LINKS, Sent, Traffic, collectives, make_mesh, traffic
from structmat.parallel.traffic import crossed, seconds

REPLICAS = {"replica": 2, "fsdp": 2, "tensor": 2}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("spec", "axes", "parts"),
    [
        (MESH, ("data",), 2),
        (MESH, ("tensor",), 2),
        (MESH, ("data", "fsdp"), 4),
        (MESH, ("data", "fsdp", "tensor"), 8),
        (REPLICAS, ("replica",), 2),
        (REPLICAS, ("replica", "fsdp"), 4),
    ],
)
def test_sums_over_chosen_axes(spec, axes, parts):
    mesh = make_mesh(spec)
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=NamedSharding(mesh, P(tuple(mesh.axis_names))))
    total = jax.shard_map(
        lambda a: jax.lax.psum(a, axes), mesh=mesh, in_specs=x.sharding.spec, out_specs=P(None, None), check_vma=False
    )
    (found,) = traffic(jax.jit(total).lower(x).compile().as_text(), mesh)
    assert found == Sent("all-reduce", axes, parts, 1, 4 * 32, 2 * 4 * 32 * (parts - 1) // parts)


@pytest.mark.parametrize(
    ("groups", "axes", "parts"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "tensor"), 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", ("data",), 2),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 8),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, use_global_device_ids=true", ("fsdp",), 2),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'tensor','data'}", ("data", "tensor"), 4),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'c'}", ("data", "tensor"), 4),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("data",), 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y':(2)2}", ("data", "tensor"), 4),
        ("source_target_pairs={{0,0},{1,1},{2,6},{6,2},{3,7},{7,3}}", ("data",), 2),
    ],
)
def test_groups_as_hlo_writes_them(groups, axes, parts):
    assert crossed(f"%x = f32[8] all-gather(%y), channel_id=1, {groups}, dimensions={{0}}", make_mesh(MESH)) == (
        axes,
        parts,
    )


def test_groups_in_another_form_are_not_guessed():
    with pytest.raises(ValueError, match="form that is not known"):
        crossed("%x = f32[8] all-gather(%y), replica_groups=other(2), dimensions={0}", make_mesh(MESH))


HOST = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
ALL = '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type='
PAIRS = "_xla_megascale_target={{200000->100003},{100003->200000}},_xla_megascale_transfer_type="
TWO_SLICES = f"""\
ENTRY %main (p: f32[8]) -> f32[8] {{
  %send = (f32[16]{{0:T(8)}}, u32[], token[]) send(%p, %t), channel_id=1, {HOST}{ALL}"ALL_REDUCE"}}
  %recv = (f32[16]{{0:T(8)}}, u32[], token[]) recv(%t), channel_id=2, {HOST}{ALL}"ALL_REDUCE"}}
  %got = (f32[16]{{0:T(8)}}, token[]) recv-done(%recv), channel_id=2, {HOST[:-1]}}}
  %recv.1 = (s32[4,2]{{1,0}}, u32[], token[]) recv(%t), channel_id=3, {HOST}{PAIRS}"ONE_TO_ONE"}}
  %pairs = f32[8]{{0}} all-gather(%p), channel_id=4, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
  %whole = f32[8]{{0}} all-reduce(%p), channel_id=5, replica_groups={{}}, to_apply=%add
}}
"""


class Device:
    """A chip of a slice, as a TPU topology has it."""

    platform = "tpu"

    def __init__(self, slice_index):
        self.slice_index = slice_index


@pytest.mark.parametrize("first", ["data", "replica"])
def test_what_goes_from_slice_to_slice(first):
    """The module is one slice's: it numbers the devices of a slice, and knows the others as targets of its sends."""
    devices = np.array([Device(i // 4) for i in range(8)]).reshape(2, 2, 2)
    mesh = SimpleNamespace(axis_names=(first, "fsdp", "tensor"), devices=devices, size=8)
    assert sorted(traffic(TWO_SLICES, mesh), key=lambda s: (s.dcn, s.kind)) == [
        Sent("all-gather", ("tensor",), 2, 1, 32, 16),
        Sent("all-reduce", ("fsdp", "tensor"), 4, 1, 32, 48),
        Sent("all-reduce", (first,), 2, 1, 64, 64, dcn=True),
        Sent("collective-permute", (first,), 2, 1, 32, 32, dcn=True),
    ]
    assert collectives(TWO_SLICES)["all-reduce"] == Traffic(2, 32 + 64)


def test_time_on_the_links():
    chip, links = "v5p", LINKS["v5p"]
    inside, across = (
        Sent("all-gather", ("fsdp",), 4, 1, 800, 600),
        Sent("all-reduce", ("data",), 2, 1, 800, 800, dcn=True),
    )
    assert seconds([inside], chip) == 600 / links.ici
    assert seconds([inside, across], chip) == pytest.approx(600 / links.ici + 800 / links.dcn)
    assert set(LINKS) == {name for name, chip in CHIPS.items() if chip.platform == "tpu"}
