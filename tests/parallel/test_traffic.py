"""Collectives by mesh axis, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import CHIPS
from structmat.parallel import LINKS, Sent, make_mesh, traffic
from structmat.parallel.traffic import crossed, seconds

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "parts"), [(("data",), 2), (("tensor",), 2), (("data", "fsdp"), 4), (("data", "fsdp", "tensor"), 8)]
)
def test_sums_over_chosen_axes(axes, parts):
    mesh = make_mesh(MESH)
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
        ("source_target_pairs={{0,0},{1,1},{2,6},{6,2},{3,7},{7,3}}", ("data",), 2),
    ],
)
def test_groups_as_hlo_writes_them(groups, axes, parts):
    assert crossed(f"%x = f32[8] all-gather(%y), channel_id=1, {groups}, dimensions={{0}}", make_mesh(MESH)) == (
        axes,
        parts,
    )


def test_time_on_the_links():
    chip, links = "v5p", LINKS["v5p"]
    inside, across = Sent("all-gather", ("fsdp",), 4, 1, 800, 600), Sent("all-reduce", ("data",), 4, 1, 800, 1200)
    assert seconds([inside], chip) == 600 / links.ici
    assert seconds([inside, across], chip) == pytest.approx(1800 / links.ici)
    assert seconds([across], chip, slices=2) == pytest.approx(1200 / links.ici + 1200 / 2 / links.dcn)
    assert set(LINKS) == {name for name, chip in CHIPS.items() if chip.platform == "tpu"}
