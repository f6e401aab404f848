"""The training steps of the large configs compiled for the pods they are meant for: `python -m experiments.pod_matrix`.

Every model with six structures in two layouts. Rows are kept in `--out` as they finish, and a program is compiled once
(`program` is the hash of what the compiler is given), so that after a change of the code only what it changed is
compiled again; `--only=llama 7b` limits the rows, `--minutes` the time. No TPU is needed; libtpu is.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from absl import app

from experiments.own_flags import OwnFlags
from experiments.pod_step import Pod, account, lower
from experiments.pod_table import name_of, outdated, report
from experiments.rows import selected, within
from structmat.training.errors import ConfigError
from structmat.training.record import Record

PODS = {
    "configs/llama.py:60m": ("v5e:4x4",),
    "configs/llama.py:130m": ("v5e:4x4",),
    "configs/llama.py:350m": ("v5e:4x4", "v5p:4x4x4"),
    "configs/llama.py:1b": ("v5e:4x4", "v5p:4x4x4"),
    "configs/llama.py:7b": ("v5p:4x4x4", "v5p:8x8x8"),
    "configs/gpt2.py:small": ("v5e:4x4",),
    "configs/gpt2.py:medium": ("v5e:4x4",),
    "configs/vit.py:b": ("v5e:4x4",),
}
CHANGES = {"configs/llama.py:1b": {"hidden": 5504}}
"""Fields of `config.model` set for every structure: 5461 hidden units fit neither the meshes nor most structures."""
STRUCTURES = {
    "dense": "dense()",
    "low_rank": "fit(low_rank(), params=0.3)",
    "monarch": "fit(monarch(order='blocked'), params=0.3)",
    "block_tensor_train": "fit(block_tensor_train(order='blocked'), params=0.3)",
    "kronecker": "fit(kronecker(), params=0.3)",
    "low_rank + random_sparse": "fit(low_rank() + random_sparse(density=0.03), params=0.3)",
}
"""By short name, all but dense with 0.3 of the dense parameters of every linear site; embeddings and heads stay dense."""
LAYOUTS = ("fsdp", "tensor")
"""fsdp: parameters and batch in parts over up to 64 chips, whole copies of that beyond. tensor: besides, every product in
4 parts."""


def mesh_of(topology: str, layout: str) -> dict[str, int]:
    """The mesh axes of a layout on a topology such as v5e:4x4."""
    chips = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    tensor = 4 if layout == "tensor" else 1
    return {"data": -1, "fsdp": min(64, chips // tensor), "tensor": tensor}


flags = OwnFlags()
_OUT = flags.DEFINE_string("out", "results/pods/matrix.json", "Record JSON to write, with the .md beside it")
_ONLY = flags.DEFINE_string(
    "only", "", "only rows whose name, such as 'llama 7b, monarch, v5p:8x8x8, tensor', has this"
)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "stop after this time; run again to go on", lower_bound=0.0)


def plan() -> list[dict[str, str]]:
    """Every row: config, structure (by short name), topology, layout."""
    return [
        {"config": config, "structure": structure, "topology": topology, "layout": layout}
        for config, topologies in PODS.items()
        for topology in topologies
        for structure in STRUCTURES
        for layout in LAYOUTS
    ]


def command_of(row: dict[str, Any]) -> str:
    """The command that compiles the row alone."""
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in mesh_of(row["topology"], row["layout"]).items())
    structure = STRUCTURES[row["structure"]].replace("'", '"')
    model = "".join(f" --config.model.{k}={v}" for k, v in CHANGES.get(row["config"], {}).items())
    return (
        f"python -m experiments.pod --config={row['config']}{model} --config.structure='{structure}' {mesh} "
        f"--topology={row['topology']}"
    )


def compiled(row: dict[str, str], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """row with the account of its step, from `known` (by program) where the compiler would be given the same.

    A config that is not valid on the pod, such as a batch too small for its chips, gives the reason instead.
    """
    module, argument = row["config"].split(".py:")
    config = importlib.import_module(module.replace("/", ".")).get_config(argument)
    config.structure = STRUCTURES[row["structure"]]
    config.mesh.update(mesh_of(row["topology"], row["layout"]))
    config.model.update(CHANGES.get(row["config"], {}))
    try:
        step = lower(config, Pod(row["topology"]))
    except ConfigError as error:
        return row | {"refused": str(error)}
    if step.program in known:
        return row | known[step.program]
    return row | account(step).row()


def run(out: Path, minutes: float, only: str) -> list[dict[str, Any]]:
    """Compile what is missing or has changed, write the Record after every row; all rows so far."""
    held = json.loads(out.read_text())["metrics"]["rows"] if out.exists() else []
    known = {r["program"]: _account_of(r) for r in held if "program" in r and not outdated(r)}
    done = {name_of(r): r for r in held}
    done_well = {name for name, r in done.items() if not outdated(r)}
    todo = sorted(selected(plan(), name_of, only), key=lambda r: name_of(r) in done_well)  # what is missing comes first
    start = time.monotonic()
    for i, row in enumerate(within(todo, minutes)):
        found = compiled(row, known)
        done[name_of(row)] = found
        print(f"[{i + 1}/{len(todo)}] {name_of(row)}: {_said(found)}", flush=True)
        record_of([done[n] for r in plan() if (n := name_of(r)) in done], time.monotonic() - start).write(out)
    return [done[n] for r in plan() if (n := name_of(r)) in done]


def _account_of(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("config", "structure", "topology", "layout")}


def _said(row: dict[str, Any]) -> str:
    if "refused" in row:
        return row["refused"]
    fits = "fits" if row["fits"] else "DOES NOT FIT"
    return f"{fits}, {row['peak'] / 2**30:.2f} GiB per chip, compiled in {row['compile_seconds']:.0f} s"


def record_of(rows: list[dict[str, Any]], seconds: float) -> Record:
    """The Record of rows, made now."""
    return Record.create(
        name="pod_matrix",
        kind="pod",
        config={"structures": STRUCTURES, "layouts": LAYOUTS, "changes": CHANGES},
        structures=STRUCTURES,
        seed=0,
        data_hash="",
        seconds=seconds,
        metrics={"rows": rows},
    )


def main(argv: list[str]) -> None:
    """Compile, then print and write the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    jax.config.update("jax_platforms", "cpu")  # topologies are compiled for, not run on
    out = Path(_OUT.value)
    rows = run(out, _MINUTES.value, _ONLY.value)
    report(rows, out, Record.read(out), command_of(rows[0]))
    print(f"written: {out}, {out.with_suffix('.md')}")


if __name__ == "__main__":
    flags.run(main)
