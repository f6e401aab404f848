"""The table of a torture run, on the screen and as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from structmat.analysis.pages import page_of
from structmat.training.record import Record


def table(figures: dict[str, Any], style: box.Box) -> Table:
    """One line per row of every figure."""
    made = Table("figure", "what", "aim", "held / tried", "notes", "seconds", "seed", "date (UTC)", "commit", box=style)
    for found in figures.values():
        for n, row in enumerate(found["rows"]):
            aim = ("all" if row["share"] == 1 else f"{row['share']:.0%}") + (
                f" of >= {row['least']}" * (row["least"] > 1)
            )
            held = f"{row['held']}/{row['tried']}" + ("" if row["ok"] else " DOES NOT HOLD")
            notes = ", ".join(f"{name} {value}" for name, value in row["notes"].items())
            cost = [f"{found['seconds']:.0f}" if n == 0 else "", str(found["seed"]), found["date"][:16]]
            made.add_row(row["id"], row["title"], aim, held, notes, *cost, found["git"][:7])
    return made


def report(record: Record, out: Path) -> int:
    """Print the table and every failure, write both as Markdown beside the Record; the number of rows that fail."""
    figures = record.metrics["figures"]
    failures = [(row["id"], text) for f in figures.values() for row in f["rows"] for text in row["failures"]]
    Console(width=None if sys.stdout.isatty() else 200).print(table(figures, box.ROUNDED))
    for id, text in failures:
        print(f"{id} {text}")
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 250)
        commands = "".join(f"\n\n    {command}" for command in dict.fromkeys(f["command"] for f in figures.values()))
        page.print(
            f"# What runs survive\n\n{record.device['cpu']}, {record.device['cores']} cores, CPU devices, jax "
            f"{record.versions['jax']}, Python {record.versions['python']}; last measured {record.date}. "
            f"Measured with{commands}\n",
            soft_wrap=True,
            markup=False,
        )
        page.print(table(figures, box.MARKDOWN))
        page.print("\nCases that did not hold:\n" if failures else "\nEvery case held.", soft_wrap=True)
        for id, text in failures:
            page.print(f"- {id} {text}", soft_wrap=True, markup=False)
    return sum(not row["ok"] for f in figures.values() for row in f["rows"])
