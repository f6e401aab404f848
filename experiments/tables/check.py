"""Configs of tables compiled for a pod before anyone pays for one: the first step of every arm, accounted for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.table import Table as Grid

from experiments.pod_step import Pod, account, lower
from experiments.rows import within
from experiments.tables.plan import arms_of, base_at
from experiments.tables.schema import Table, TableError
from structmat.training.record import Record


def check(tables: Sequence[Table], scale: str, out: Path, minutes: float) -> list[dict[str, Any]]:
    """Compile what `out` does not have yet, for as long as there is time; all rows so far.

    A row is known by the hash of its program, so an arm that another table has too is compiled once.

    Raises:
      TableError: a table has no such scale, or its configs belong on no pod. MeshError: libtpu is missing.
    """
    jax.config.update("jax_platforms", "cpu")  # topologies are compiled for, not run on
    held = json.loads(out.read_text())["metrics"]["rows"] if out.exists() else []
    done, started = {(r["table"], r["arm"]): r for r in held}, time.monotonic()
    plans = [(table, arm.name, config) for table in tables for arm, config in _arms(table, scale)]
    todo = [plan for plan in plans if (plan[0].name, plan[1]) not in done]
    for i, (table, arm, config) in enumerate(within(todo, minutes), 1):
        pod = base_at(table, scale).pod
        step = lower(config, Pod(pod))
        known = next((r for r in done.values() if r["program"] == step.program), None)
        found = {k: v for k, v in known.items() if k not in ("table", "arm")} if known else account(step).row()
        done[table.name, arm] = {"table": table.name, "arm": arm, "structure": config.structure} | found
        print(f"[{i}/{len(todo)}] {table.name}, {arm}: {'fits' if found['fits'] else 'DOES NOT FIT'}", flush=True)
        _record(list(done.values()), scale, time.monotonic() - started).write(out)
    return list(done.values())


def _arms(table: Table, scale: str) -> Any:
    if not base_at(table, scale).pod:
        raise TableError(f"table {table.name}: runs at scale {scale} need no pod; scale paper does")
    return arms_of(table, scale)


def _record(rows: list[dict[str, Any]], scale: str, seconds: float) -> Record:
    return Record.create(
        name=f"tables_{scale}",
        kind="pod",
        config={"scale": scale},
        structures={f"{r['table']}, {r['arm']}": r["structure"] for r in rows if "->" not in r["structure"]},
        seed=0,
        data_hash="",
        seconds=seconds,
        metrics={"rows": rows},
    )


def grid(rows: Sequence[dict[str, Any]], style: box.Box) -> Grid:
    """One line per arm."""
    made = Grid(
        "table", "arm", "pod", "params M", "GiB per chip", "of HBM", "fits", "least ms a step", "MFU bound", box=style
    )
    for r in rows:
        least = (max(r["compute"], r["memory"]) + r["network"]) * 1e3
        made.add_row(
            r["table"],
            r["arm"],
            r["pod"],
            f"{r['params'] / 1e6:.1f}",
            f"{r['peak'] / 2**30:.2f}",
            f"{r['peak'] / r['hbm']:.0%}",
            "yes" if r["fits"] else "NO",
            f"{least:.1f}" if r["fits"] else "-",
            f"{r['mfu'][0]:.0%}" if r["mfu"] else "-",
        )
    return made


def page(rows: Sequence[dict[str, Any]], record: Record) -> tuple[str, Grid, str]:
    """Markdown before the table, the table, and after it."""
    about = (
        f"jax {record.versions['jax']}, libtpu {record.versions.get('libtpu', '(unknown)')}, {record.date}, last call "
        f"`{record.command}`. The paper's own model and batch, data parallel, the first stage of every arm; nothing ran. GiB "
        "are arguments and temporaries, which a program need not hold all at once: the compiler placed what is said to fit."
    )
    kept = sum(r["fits"] for r in rows)
    return (
        f"# Configs at the papers' own scale, compiled\n\n{about}\n",
        grid(rows, box.MARKDOWN),
        f"{kept} of {len(rows)} fit.",
    )
