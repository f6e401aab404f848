"""The table of steps compiled for pods: memory saved against dense, bytes sent, and which layout is best."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.pod_step import VERSION
from structmat.analysis.pages import page_of
from structmat.training.record import Record

COLUMNS = (
    "model", "structure", "topology", "layout", "params M", "GiB per chip", "of HBM", "state GiB", "memory saved",
    "sent MiB", "sent less", "least ms", "MFU bound", "kernels",
)  # fmt: skip


def name_of(row: dict[str, Any]) -> str:
    """`llama 7b, monarch, v5p:8x8x8, tensor`."""
    return f"{model_of(row)}, {row['structure']}, {row['topology']}, {row['layout']}"


def model_of(row: dict[str, Any]) -> str:
    """`llama 7b`."""
    return row["config"].removeprefix("configs/").replace(".py:", " ")


def least(row: dict[str, Any]) -> float:
    """Least seconds of a step with no communication hidden."""
    return max(row["compute"], row["memory"]) + row["network"]


def sent(row: dict[str, Any]) -> int:
    """Bytes one chip sends in a step."""
    return sum(s["wire"] for s in row["sent"])


def best(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the rows whose layout has the least time among those of the same step that fit."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in rows:
        if r.get("fits"):
            groups.setdefault((r["config"], r["structure"], r["topology"]), []).append(r)
    return {name_of(min(group, key=least)) for group in groups.values()}


def table(rows: list[dict[str, Any]], style: box.Box) -> Table:
    """One line per row; against dense of the same model, topology and layout. * marks the better layout."""
    made = Table(*COLUMNS, box=style)
    winners = best(rows)
    dense = {(r["config"], r["topology"], r["layout"]): r for r in rows if r["structure"] == "dense" and "peak" in r}
    for r in rows:
        head = [model_of(r), r["structure"], r["topology"], r["layout"] + "*" * (name_of(r) in winners)]
        if "refused" in r:
            made.add_row(*head, *["-"] * (len(COLUMNS) - 4))
            continue
        other = dense.get((r["config"], r["topology"], r["layout"]))
        ratio = lambda of, r=r, other=other: f"{of(other) / of(r):.2f}x" if other and of(r) and of(other) else "-"
        cells = [f"{r['params'] / 1e6:.1f}", f"{r['peak'] / 2**30:.2f}", f"{r['peak'] / r['hbm']:.0%}"]
        cells += [f"{r['state'] / 2**30:.2f}", ratio(lambda q: q["peak"])]
        if r["fits"]:
            names = ", ".join(f"{name} x {n}" for name, n in sorted(r["kernels"].items()))
            cells += [f"{sent(r) / 2**20:.0f}", ratio(sent), f"{least(r) * 1e3:.1f}"]
            cells += [f"{r['mfu'][0]:.0%} / {r['mfu'][1]:.0%}", names or "none"]
        else:
            cells += ["does not fit", "-", "-", "-", "-"]
        made.add_row(*head, *cells)
    return made


def outdated(row: dict[str, Any]) -> bool:
    """Whether bytes sent were counted by an older version that may have been wrong about them: with one mesh axis in use
    every group extends along it, so all versions agree."""
    one_axis = sum(size > 1 for size in row.get("mesh", {}).values()) <= 1
    return bool(row.get("fits")) and not one_axis and row.get("version", 1) != VERSION


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on all rows: what fits, what left its plan, what was refused, which layout won how often."""
    built = [r for r in rows if "peak" in r]
    large = [name_of(r) for r in built if not r["fits"]]
    off = [name_of(r) for r in built if r["off_plan"]]
    winners = best(rows)
    won = {layout: sum(name_of(r) in winners for r in built if r["layout"] == layout) for layout in _layouts(rows)}
    said = [
        f"{len(built)} steps compiled; {len(built) - len(large)} fit"
        + (f", all but {'; '.join(large)}." if large else "."),
        "Compiled shardings are the planned ones in all."
        if not off
        else f"In {len(off)} some leaves are not laid out as planned: {'; '.join(off)}.",
        "Layout with the least time: " + ", ".join(f"{name} in {n}" for name, n in won.items()) + " (marked *).",
    ]
    old = [name_of(r) for r in rows if outdated(r)]
    if old:
        said.append(
            f"Bytes sent of {len(old)} rows, least times and MFU bounds with them, were counted by an older version that "
            "took some groups of chips for all of them, and so too much; the command counts "
            f"them again: {'; '.join(old)}."
        )
    return said + [f"Refused: {name_of(r)}: {r['refused']}" for r in rows if "refused" in r]


def _layouts(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["layout"] for r in rows))


def report(rows: list[dict[str, Any]], out: Path, record: Record, example: str) -> None:
    """Print the table, and write it as Markdown beside the Record; `example` is the command of the first row."""
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table(rows, box.ROUNDED))
    for line in verdict(rows):
        console.print(line, soft_wrap=True, markup=False)
    about = (
        f"jax {record.versions['jax']}, libtpu {record.versions.get('libtpu', '(unknown)')}, {record.date}, "
        f"last call `{record.command}`; one row alone: `{example}`. Nothing ran: memory, sharding, collectives and kernels are those "
        "of the compiled program, per chip; `memory saved` and `sent less` are against dense in the same layout. `least "
        "ms` is arithmetic or HBM traffic at peak rates, whichever is longer, plus all bytes sent over the links; the MFU "
        "bound is with all communication hidden / with none. FLOPs are the structures' own."
    )
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 300)
        page.print(f"# Training steps compiled for TPU pods\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(rows, box.MARKDOWN))
        for line in verdict(rows):
            page.print("\n" + line, soft_wrap=True, markup=False)
