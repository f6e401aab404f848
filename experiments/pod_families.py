"""Where every family's weights go on a pod: `python -m experiments.pod_families`.

The training step of one block of a transformer whose products have the family's structure, compiled for v5e:2x4
with every mesh axis in use: the layout planned for parameters and moments beside that of the compiled program, and what
the program sends over which axis. Rows are kept in `--out` as they finish. No TPU is needed; libtpu is.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import app
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.own_flags import OwnFlags
from experiments.pod_step import VERSION, Pod, account, lower
from experiments.rows import within
from structmat.analysis.pages import page_of
from structmat.parallel import plan, replicated
from structmat.structures import FAMILIES, parse
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.record import Record

POD, POD_DEVICES = Pod("v5e:2x4"), 8
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
WIDTH = 1024
CONTEXT = 255
"""One below a multiple of the 128 lanes, as a batch has one token more: its rows then take no more than their bytes."""
LARGE = 2**20
"""Bytes of a leaf that no chip should hold whole."""
SUBLANES, LANES = 8, 128
"""A TPU holds arrays in tiles of these sizes over their last two dimensions."""

flags = OwnFlags()
_OUT = flags.DEFINE_string("out", "results/pods/families.json", "Record JSON to write, with the .md beside it")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "stop after this time; run again to go on", lower_bound=0.0)
_FRESH = flags.DEFINE_bool("fresh", False, "compile again what --out already has")


def config_of(structure: str) -> ConfigDict:
    """One block of width 1024 on bytes, every linear site of the structure."""
    config = default("lm")
    config.update(structure=structure, batch=64)
    config.model.update(layers=1, width=WIDTH, heads=16, context=CONTEXT)
    config.mesh.update(MESH)
    return config


SCOPES = ("", ".*/attn/.* -> ", ".*/(attn/[kv]|mlp/up) -> ", ".*/attn/[kv] -> ")
"""All linear sites; the square ones; those that do not start at zero, for families that cannot; the square ones of these."""


@functools.cache
def real_families() -> dict[str, str]:
    """Family -> its example as rules, for those a model of real numbers takes, at the first of SCOPES that it fits."""
    found = {}
    for name, family in FAMILIES.items():
        example = parse(family.about.example)
        if not example.bind(WIDTH, WIDTH).is_complex:
            found[name] = next(rules for scope in SCOPES if _valid(rules := scope + family.about.example))
    return found


def _valid(rules: str) -> bool:
    try:
        validate(config_of(rules), POD_DEVICES)
    except ConfigError:
        return False
    return True


def compiled(family: str, structure: str) -> dict[str, Any]:
    """Plan and program of a family.

    Returns:
      params; `planned` and `compiled`: bytes of all arguments (state and batch) on one chip; `padded`: the planned ones with
      every array in whole tiles as its dimensions are; `whole`: of the state if every
      chip held all of it; `replicated`: leaves over 1 MiB planned whole on every chip; `off_plan`: leaves whose compiled
      sharding is another; `sent`: collectives by kind and axes.
    """
    step = lower(config_of(structure), POD)
    found = account(step)
    if not found.fits:
        raise RuntimeError(f"{family}: does not fit on {POD}")
    leaves = plan(step.template, jax.tree.map(lambda leaf: leaf.sharding, step.template))
    batch = sum(s.size * s.dtype.itemsize for s in step.task.batch.values()) // (MESH["data"] * MESH["fsdp"])
    held = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(step.template)]
    row = found.row()
    return {
        "family": family,
        "structure": structure,
        "params": found.params,
        "leaves": len(leaves),
        "whole": sum(leaf.bytes for leaf in leaves),
        "planned": found.state + batch,
        "compiled": found.arguments,
        "padded": sum(in_tiles(shape) * size for shape, size in held) + batch,
        "replicated": [leaf.path for leaf in replicated(leaves, LARGE)],
        "off_plan": found.off_plan,
        "sent": row["sent"],
        "kernels": row["kernels"],
        "compile_seconds": found.compile_seconds,
        "version": VERSION,
    }


def in_tiles(shape: tuple[int, ...]) -> int:
    """Entries an array of this shape takes in whole tiles, one of a single dimension in one row of them."""
    up = lambda n, by: -(-n // by) * by
    if len(shape) < 2:
        return up(math.prod(shape), SUBLANES * LANES)
    return math.prod(shape[:-2]) * up(shape[-2], SUBLANES) * up(shape[-1], LANES)


def run(out: Path, minutes: float, fresh: bool) -> list[dict[str, Any]]:
    """Compile what is missing, write the Record after every row; all rows so far."""
    held = json.loads(out.read_text())["metrics"]["rows"] if out.exists() and not fresh else []
    families, start = real_families(), time.monotonic()
    done = {r["family"]: r for r in held if families.get(r["family"]) == r["structure"]}
    todo = [name for name in families if done.get(name, {}).get("version") != VERSION]
    for i, name in enumerate(within(todo, minutes), 1):
        done[name] = compiled(name, families[name])
        print(f"[{i}/{len(todo)}] {name}: {judged(done[name]) or 'as planned'}", flush=True)
        rows = [done[n] for n in families if n in done]
        record_of(rows, time.monotonic() - start).write(out)
    return [done[n] for n in families if n in done]


def judged(row: dict[str, Any]) -> str:
    """What is wrong with a row, or nothing."""
    faults = [f"{path} is laid out otherwise" for path in row["off_plan"]]
    faults += [f"{path} is whole on every chip" for path in row["replicated"]]
    if not row["planned"] <= row["compiled"] <= row["padded"]:
        faults.append(f"arguments take {row['compiled']} bytes of a chip, planned {row['planned']} to {row['padded']}")
    return "; ".join(faults)


def record_of(rows: list[dict[str, Any]], seconds: float) -> Record:
    """The Record of rows, made now."""
    config = config_of("dense()").to_dict()
    return Record.create(
        name="pod_families",
        kind="pod",
        config=json.loads(json.dumps(config)) | {"pod": str(POD)},
        structures={r["family"]: r["structure"] for r in rows},
        seed=config["seed"],
        data_hash="",
        seconds=seconds,
        metrics={"rows": rows},
    )


def table(rows: list[dict[str, Any]], style: box.Box) -> Table:
    """One line per family."""
    axes = list(MESH)
    made = Table("family", "structure", "params M", "state of a chip", "planned MiB", "in tiles", "compiled MiB", "leaves off plan",
                 "whole on all", *[f"MiB sent over {axis}" for axis in axes], "kernels", box=style)  # fmt: skip
    for r in rows:
        over = lambda axis, r=r: sum(s["wire"] for s in r["sent"] if axis in s["axes"]) / 2**20
        made.add_row(
            r["family"],
            escape(r["structure"]),
            f"{r['params'] / 1e6:.2f}",
            f"{r['planned'] / r['whole']:.0%}",
            f"{r['planned'] / 2**20:.3f}",
            f"{r['padded'] / 2**20:.3f}",
            f"{r['compiled'] / 2**20:.3f}",
            f"{len(r['off_plan'])} of {r['leaves']}",
            str(len(r["replicated"])),
            *[f"{over(axis):.1f}" for axis in axes],
            ", ".join(f"{name} x {n}" for name, n in sorted(r["kernels"].items())) or "none",
        )
    return made


def report(rows: list[dict[str, Any]], out: Path, record: Record) -> None:
    """Print the table, and write it as Markdown beside the Record."""
    kept = [r for r in rows if not judged(r)]
    said = [f"{len(kept)} of {len(rows)} families are laid out as planned."]
    said += [f"{r['family']}: {judged(r)}." for r in rows if judged(r)]
    if old := [r["family"] for r in rows if r.get("version") != VERSION]:
        said.append(
            f"Bytes sent of {len(old)} families were counted by an older version that put some of them on too many axes; the "
            "command counts them again."
        )
    shape = ", ".join(f"{axis}={size}" for axis, size in MESH.items())
    about = (
        f"jax {record.versions['jax']}, libtpu {record.versions.get('libtpu', '(unknown)')}, {record.date}, last call "
        f"`{record.command}`. The training step of one transformer block of width {WIDTH}, 64 x {CONTEXT} tokens, AdamW, "
        f"compiled for {POD} ({shape}); nothing ran. Planned and compiled: bytes of parameters, moments and batch on one "
        f"chip. TPUs hold arrays in tiles of {SUBLANES} x {LANES}; in tiles: the planned arrays so, which the compiler may undercut by "
        "another order of dimensions. Narrow factors take several times their bytes. Bytes sent are of one "
        "chip and step, and count for every axis their group extends along."
    )
    Console(width=None if sys.stdout.isatty() else 220).print(table(rows, box.ROUNDED))
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 300)
        page.print(f"# Layout of every family, planned and compiled\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(rows, box.MARKDOWN))
        for line in said:
            print(line)
            page.print("\n" + line, soft_wrap=True, markup=False)


def main(argv: list[str]) -> None:
    """Compile, then print and write the table; ends with code 1 where a family leaves its plan."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    jax.config.update("jax_platforms", "cpu")  # the topology is compiled for, not run on
    out = Path(_OUT.value)
    rows = run(out, _MINUTES.value, _FRESH.value)
    if not rows:
        print("no rows yet")
        return
    report(rows, out, Record.read(out))
    print(f"written: {out}, {out.with_suffix('.md')}")
    if any(judged(r) for r in rows):
        sys.exit("some families are not laid out as planned")


if __name__ == "__main__":
    flags.run(main)
