"""What a run would train and need, as tables: sites, totals, and the memory of the compiled step."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from structmat.nn import leaf_groups
from structmat.training.state import TrainState
from structmat.training.task import Task


def show_sites(task: Task, template: TrainState, console: Console) -> None:
    """One row per site of arrays (a scanned group is one row) and one for everything else."""
    table = Table(title=f"{task.name}: parameters", header_style="bold")
    columns = ("site", "shape", "structure", "params", "dense", "compression", "sharding", "optimiser")
    for column in columns:
        table.add_column(column, justify="right" if column in columns[3:6] + columns[7:] else "left", overflow="fold")
    kept = _sizes(template.params), _sizes(template.frozen)
    opt = _sizes(template.opt_state)
    totals = [0, 0, 0]
    claimed: set[str] = set()
    for place, (_, site) in leaf_groups(task.table).items():
        name, names = "/".join(place), site.bound.leaves()
        own = [f"{name}/{leaf}" for leaf in names]
        mine = lambda path: any(path == o or path.startswith(o + "/") for o in own)  # noqa: B023
        leaves = {p: v for part in kept for p, v in part.items() if mine(p)}
        claimed |= set(leaves)
        layers = site.stack.size if site.stack else 1
        params, dense = layers * site.bound.params, layers * site.bound.dense_params
        bytes_ = _mirrored(opt, leaves)
        totals = [a + b for a, b in zip(totals, (params, dense, bytes_))]
        specs = " ".join(f"{p.removeprefix(name + '/')}{_spec(v)}" for p, v in leaves.items())
        shape = (f"{layers} x " if layers > 1 else "") + f"{site.bound.d_in} x {site.bound.d_out}"
        row = (name, shape, site.bound.structure.short(), f"{params:,}", f"{dense:,}", _ratio(dense, params))
        table.add_row(*row, specs, _bytes(bytes_))
    rest = {p: v for part in kept for p, v in part.items() if p not in claimed}
    count, bytes_ = sum(math.prod(v.shape) for v in rest.values()), _mirrored(opt, rest)
    table.add_row("biases, norms, positions", "", "", f"{count:,}", f"{count:,}", "", "", _bytes(bytes_))
    table.add_section()
    table.add_row("sites", "", "", f"{totals[0]:,}", f"{totals[1]:,}", _ratio(totals[1], totals[0]), "", "")
    whole, dense = totals[0] + count, totals[1] + count
    table.add_row("model", "", "", f"{whole:,}", f"{dense:,}", _ratio(dense, whole), "", _bytes(totals[2] + bytes_))
    console.print(table)


def show_cost(task: Task, template: TrainState, compiled: jax.stages.Compiled, mesh: Mesh, console: Console) -> None:
    """FLOPs per unit, the mesh, and the memory one device needs for the step."""
    forward = task.flops()
    shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    console.print(f"mesh: {shape} ({mesh.devices.size} x {mesh.devices.flat[0].device_kind})")
    whole = task.step_flops()
    console.print(f"FLOPs per {task.unit}: {forward:,} forward, {whole:,} a training step; {task.units:,} a step")
    state = sum(_nbytes(leaf) for leaf in jax.tree.leaves(template))
    console.print(f"state: {_bytes(state)} over all devices, one copy")
    memory: Any = compiled.memory_analysis()
    if memory is None:
        console.print("memory: this backend does not tell")
        return
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    shown = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    console.print(f"memory of the compiled step per device: {_bytes(sum(parts.values()))} ({shown})")


def _sizes(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _mirrored(opt: dict[str, Any], leaves: dict[str, Any]) -> int:
    """Bytes of optimiser leaves kept for these parameters."""
    return sum(_nbytes(v) for p, v in opt.items() if any(p.endswith("/" + name) for name in leaves))


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _spec(leaf: Any) -> str:
    axes = ["+".join(a) if isinstance(a, tuple) else a or "-" for a in leaf.sharding.spec]
    return "(" + ",".join(axes) + ")"


def _ratio(dense: int, params: int) -> str:
    return f"{dense / params:.2f}x" if params else "all"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
