# %% [markdown]
# # 5. Sharding
#
# Spread structured weights over a mesh of devices: who holds what, what is sent, the same losses as on one device, and a
# training step compiled for a TPU pod on a machine without TPUs.
#
# Every leaf of a structure carries the logical names of its axes (`embed`, `mlp`, ...), and rules map names to mesh axes. The
# mesh has the axes `data`, `fsdp` (replicas that share their parameters) and `tensor` (parts of one product). Here eight
# virtual devices stand in for eight chips: one processor computes for all, so times say nothing, layouts and messages all.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # set before jax is imported
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# %%
# setup

# %%
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from structmat.nn import StructuredDense
from structmat.parallel import batch_sharding, compile_for, make_mesh, on_mesh, placed, shard_batch, shardings, unbox
from structmat.training.build import compile_step, optimizer_for, step_for
from structmat.training.config import default, validate
from structmat.training.state import create_state, plan_state

# %% [markdown]
# ## Who holds what
#
# A layer of Monarch weights on a mesh of 2 x 2 x 2 devices. Each panel is an array, its first axes downwards; a colour is a
# part, and the legend says which devices hold it. Look at the factors: `R` meets the input and `L` the output, so each is
# split along the axes it meets. Devices that differ in `data` only hold the same.
#
# **Try:** `dict(tensor=8)`, `dict(data=8)` (all hold all), or the structure `"low_rank(rank=8)"`.

# %%
mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
layer = StructuredDense(64, "monarch(blocks=4, order='blocked')", in_axes="embed", out_axes="mlp")
x = jax.ShapeDtypeStruct((16, 64), jnp.float32)


def draw(layer, mesh):
    """Who holds which part of every leaf, and the parameters so placed."""
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
    places = shardings(mesh, boxed)
    with on_mesh(mesh):
        init = jax.jit(lambda key: unbox(layer.init(key, jnp.zeros(x.shape))), out_shardings=places)
        params = init(jax.random.key(0))["params"]
    figure = Figure(figsize=(3.2 * len(params), 4), layout="constrained")
    for panel, (name, array) in zip(figure.subplots(1, len(params), squeeze=False)[0], params.items()):
        held = np.zeros(array.shape, int)  # a bit per device
        for shard in array.addressable_shards:
            held[shard.index] += 1 << shard.device.id
        parts = np.unique(held)
        matrix = held.reshape(int(np.prod(array.shape[: array.ndim // 2])), -1)
        panel.imshow(np.searchsorted(parts, matrix), cmap="tab10", vmin=0, vmax=9, aspect="auto")
        panel.set_title(f"{name} {array.shape}\n{array.sharding.spec}", fontsize=8)
        for i, part in enumerate(parts):
            who = ", ".join(str(d) for d in range(mesh.size) if part >> d & 1)
            panel.plot([], [], "s", color=f"C{i}", label=f"devices {who}")
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    display(figure)
    return params


params = draw(layer, mesh)
jax.debug.visualize_array_sharding(params["R"].reshape(64, -1))  # jax's own picture of the same, for matrices

# %% [markdown]
# ## What is sent
#
# Two layers as in a transformer's MLP, split over `tensor`: the first by its outputs, the second by its inputs. Compiled for the
# mesh, the program says which collectives it runs. Dense weights need one all-reduce, and so do structured ones whose blocks lie
# where the devices are. Look at `order='paper'`, the papers' order of outputs: it costs an all-to-all, which is why training
# configs say `order='blocked'`. And at `fsdp`: weights are gathered before they are used, so fewer parameters are fewer bytes.
#
# **Try:** `"butterfly()"` with both widths equal, or a longer list of structures.


# %%
class MLP(nn.Module):
    """Up and down, with a nonlinearity between."""

    structure: str

    @nn.compact
    def __call__(self, x):
        own = dict(use_bias=False, path="factored")
        up = StructuredDense(512, self.structure, in_axes="embed", out_axes="mlp", name="up", **own)
        down = StructuredDense(128, self.structure, in_axes="mlp", out_axes="embed", name="down", **own)
        return down(nn.gelu(up(x)))


def collectives(text, spec):
    """Kinds of collectives of a forward pass, how often each runs, and the bytes of its results on a device."""
    mesh, model = make_mesh(spec), MLP(text)
    rows = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=batch_sharding(mesh))
    boxed = jax.eval_shape(model.init, jax.random.key(0), rows)
    variables = placed(boxed, shardings(mesh, boxed))
    program = compile_for(mesh, model.apply, variables, rows, out_shardings=batch_sharding(mesh))
    said = [f"{found.count} {kind}, {found.bytes / 1024:.0f} KiB" for kind, found in program.collectives.items()]
    return "; ".join(said) or "none"


structures = ["dense()", "monarch(blocks=8, order='blocked')", "monarch(blocks=8, order='paper')", "low_rank(rank=16)"]
lines = ["| structure | tensor=8 | fsdp=8 | data=8 |", "|---|---|---|---|"]
for text in structures:
    row = " | ".join(collectives(text, {axis: 8}) for axis in ("tensor", "fsdp", "data"))
    lines.append(f"| `{text}` | {row} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## The same losses
#
# The whole training step of a classifier of digits, on one device and on all eight in two layouts. Look at the last column: sums
# run in another order, so float32 rounds differently, and that is all.
#
# **Try:** other meshes (their product must be 8: try `dict(data=3)` for the error), other structures, more steps.

# %%
config = default("digits")
config.steps = 10
config.optim.update(lr=0.01, warmup=1.0)
config.structure = "fit(monarch(order='blocked'), params=0.3)"


def losses(spec, devices, steps=5):
    """Training losses on a mesh of these devices."""
    mesh = make_mesh(spec, devices)
    config.mesh.update(spec)
    task = validate(config, len(devices))
    source = task.load()
    tx, schedule = optimizer_for(config, task)
    with on_mesh(mesh):
        template = plan_state(task, tx, None, mesh)
        state = create_state(task, tx, None, template, config.seed)
        step_fn = compile_step(task, step_for(config, task, tx, None, schedule), template, mesh)
        found = []
        for step in range(steps):
            state, metrics = step_fn(state, shard_batch(mesh, source.batch(step, None)))
            found.append(float(metrics["loss"]))
    return np.array(found)


one = losses(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
lines = ["| mesh | losses of five steps | largest relative difference |", "|---|---|---|"]
lines.append(f"| one device | {', '.join(f'{x:.4f}' for x in one)} | |")
for spec in (dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)):
    found = losses(spec, jax.devices())
    lines.append(f"| {spec} | {', '.join(f'{x:.4f}' for x in found)} | {np.max(np.abs(found / one - 1)):.1e} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Before the pod
#
# With libtpu installed (`pip install 'structmat[tpu]'`) the step of any config is compiled here for a TPU topology: memory of a
# chip, collectives, kernels in the program, and bounds of the utilisation. Nothing runs. Look at "fits" and at what crosses which
# axis.
#
# **Try:** `--config.batch`, `--topology=v5p:2x2x1` (of four chips, so `--config.mesh.fsdp=2`), or `dense()`.

# %%
command = """python -m experiments.pod --config=configs/digits.py --config.batch=4096 --config.model.width=2048
    --config.structure=monarch(blocks=4,order='blocked') --config.mesh.fsdp=4 --config.mesh.tensor=2 --topology=v5e:2x4"""
if importlib.util.find_spec("libtpu"):
    words = [sys.executable, *command.split()[1:]]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "110"})
    print(done.stdout or done.stderr)
else:
    print("libtpu is not installed here; below is the report that the repository keeps")

# %% [markdown]
# The report on large models, made in the same way and kept in `results/pods`: LLaMA 7B, dense and with `fit(..., params=0.3)`.
# Bytes are sent by each chip in each step. Look at both layouts: what a structure saves there depends on the layout.

# %%
stored = json.loads(Path("results/pods/matrix.json").read_text())
print(f"jax {stored['versions']['jax']}, libtpu {stored['versions']['libtpu']}, {stored['date'][:10]}; nothing ran")
lines = ["| structure | topology | layout | GiB a chip | MiB sent | utilisation at most |", "|---|---|---|---|---|---|"]
for row in stored["metrics"]["rows"]:
    if "7b" in row["config"] and row["fits"] and row["structure"] in ("dense", "low_rank", "monarch"):
        sent = sum(found["wire"] for found in row["sent"]) / 2**20
        best, worst = row["mfu"]
        sizes = f"{row['peak'] / 2**30:.2f} | {sent:,.0f} | {worst:.0%} to {best:.0%}"
        lines.append(f"| {row['structure']} | {row['pod']} | {row['layout']} | {sizes} |")
display(Markdown("\n".join(lines)))
