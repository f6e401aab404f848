"""Tables of `experiments.projection`."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from structmat.analysis.pages import page_of
from structmat.training.record import Record

TOLERANCE = 1e-5
"""A row fails where our error exceeds the reference's by more than this share of it."""


def summary(rows: list[dict], style: box.Box) -> Table:
    """Per structure the worst ratios and the median times."""
    names = [
        "structure",
        "shape",
        "reference",
        "worst ratio",
        "in f32",
        "ms",
        "reference ms",
        "time ratio",
        "compile s",
    ]
    table = Table(*names, box=style)
    for label in dict.fromkeys(r["label"] for r in rows):
        own = [r for r in rows if r["label"] == label]
        figures = ["-", "-", f"{median(own, 'ms'):.2f}", "-", "-"]
        if "ratio" in own[0]:
            worst = [mark(max(r["ratio"] for r in own)), f"{max(r['ratio_f32'] for r in own):.6f}"]
            figures = [*worst, figures[2], f"{median(own, 'reference_ms'):.2f}", f"{median(own, 'time_ratio'):.2f}"]
        shape, compile_s = "x".join(map(str, own[0]["shape"])), f"{own[0]['compile_ms'] / 1e3:.1f}"
        table.add_row(label, shape, own[0]["reference"], *figures, compile_s)
    return table


def median(rows: list[dict], key: str) -> float:
    """Of one column."""
    return statistics.median(r[key] for r in rows)


def mark(ratio: float) -> str:
    """The ratio as text, marked where the reference is nearer."""
    return f"{ratio:.6f}" + ("" if ratio <= 1 + TOLERANCE else " FAILS")


def details(rows: list[dict], style: box.Box) -> Table:
    """Every row."""
    table = Table("structure", "matrix", "error", "reference's", "ratio", "error in f32", box=style)
    for r in rows:
        other = [f"{r['reference_error']:.3e}", mark(r["ratio"])] if "ratio" in r else ["-", "-"]
        table.add_row(r["label"], r["matrix"], f"{r['error']:.3e}", *other, f"{r['error_f32']:.3e}")
    return table


def svd_table(rows: list[dict], style: box.Box) -> Table:
    """Excess of the randomised error over the optimum, and times."""
    table = Table(
        "n", "spectrum", "rank", "iterations", "error over optimum - 1", "ms", "exact ms", "speed-up", box=style
    )
    for r in rows:
        figures = [f"{r['excess']:.1e}", f"{r['ms']:.0f}", f"{r['exact_ms']:.0f}", f"{r['speedup']:.1f}"]
        table.add_row(*(str(r[k]) for k in ("n", "spectrum", "rank", "iterations")), *figures)
    return table


def report(record: Record, out: Path) -> None:
    """Print the table, and write it (and every row) as Markdown beside the Record."""
    rows, versions, svd = record.metrics["rows"], record.versions, record.config["svd"]
    tables = [svd_table] if svd else [summary, details]
    Console(width=None if sys.stdout.isatty() else 200).print(tables[0](rows, box.ROUNDED))
    title = "Randomised SVDs beside exact ones" if svd else "Projections beside other libraries"
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 250)
        page.print(
            f"# {title}\n\n{record.device['cpu']}, {record.device['cores']} cores, {record.device['platform']}, jax "
            f"{versions['jax']}, {record.date}, `{record.command}`. {record.config['note']}\n",
            soft_wrap=True,
            markup=False,
        )
        for table in tables:
            page.print(table(rows, box.MARKDOWN))
            page.print()
