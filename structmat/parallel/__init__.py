"""Where arrays live: named meshes, logical-axis rules, plan against program, ahead-of-time compiles for pods.

In the order a training run uses them:

    group = init_distributed()                            # first of all, on every host of a pod; else does nothing
    mesh = make_mesh({"data": 2, "fsdp": -1})             # axes replica, data, fsdp, tensor; every device is used
    boxed = jax.eval_shape(model.init, key, example)      # variables as Linen returns them, with logical axes
    variables = shardings(mesh, boxed)                    # a NamedSharding per leaf, tree as unbox(boxed)
    state = state_shardings(mesh, variables, abstract)    # a NamedSharding per leaf of any state around them
    rows = local_rows(mesh, batch_size)                   # the rows this process has to make
    batch = shard_batch(mesh, numpy_batch, batch_size)    # global arrays, sharded as batch_sharding(mesh)
    with on_mesh(mesh):                                   # set_mesh + logical rules; without it constraints do nothing
        jax.jit(step, in_shardings=(state, batch_sharding(mesh)), out_shardings=(state, None), donate_argnums=0)

`plan`, `differences`, `replicated` and `collectives` say what was planned and what was compiled; `topology_mesh` and
`compile_for` do so for a TPU pod on a machine without TPU.
"""

from structmat.parallel.aot import Program, compile_for, describe, placed, topology_mesh
from structmat.parallel.distributed import Group, current_group, init_distributed
from structmat.parallel.hosts import HostsError
from structmat.parallel.mesh import AXES, MeshError, make_mesh
from structmat.parallel.report import LeafPlan, Traffic, bytes_per_device, collectives, differences, plan, replicated
from structmat.parallel.rules import (
    DEFAULT_RULES,
    AxisRules,
    batch_sharding,
    local_rows,
    on_mesh,
    shard_batch,
    shardings,
    spec_for,
    state_shardings,
    unbox,
)
from structmat.parallel.traffic import LINKS, Links, Sent, traffic

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "LINKS",
    "AxisRules",
    "Group",
    "HostsError",
    "LeafPlan",
    "Links",
    "MeshError",
    "Program",
    "Sent",
    "Traffic",
    "batch_sharding",
    "bytes_per_device",
    "collectives",
    "compile_for",
    "current_group",
    "describe",
    "differences",
    "init_distributed",
    "local_rows",
    "make_mesh",
    "on_mesh",
    "placed",
    "plan",
    "replicated",
    "shard_batch",
    "shardings",
    "spec_for",
    "state_shardings",
    "topology_mesh",
    "traffic",
    "unbox",
]
