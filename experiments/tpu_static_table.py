"""What the compiler's estimates of one product say, and the table of all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from structmat.analysis.pages import page_of

LABEL = "compiler's estimate, not a measurement"
COLUMNS = ("dense", "xla", "pallas")


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """row with `speedup` of the rule's choice over dense, `over_xla`, `slower`: whether XLA would have been faster,
    and `missed`: whether a kernel left aside would have been.

    Compared are max(cycles, memory floor), since operands that XLA keeps on chip are charged no memory time; what has no
    estimate is None.
    """
    at_least = {
        name: cycles and max(cycles, row["dense_floor" if name == "dense" else "floor"])
        for name, cycles in row["cycles"].items()
    }
    chosen, over = at_least.get(row["rule"]), lambda other: other / chosen if other and chosen else None
    over_xla, kernel = over(at_least.get("xla")), at_least.get("pallas")
    return row | {
        "speedup": over(at_least.get("dense")),
        "over_xla": over_xla,
        "slower": over_xla is not None and over_xla < 1,
        "missed": row["rule"] == "xla" and bool(kernel and chosen) and kernel < chosen,
    }


def name_of(row: dict[str, Any]) -> str:
    """`monarch blocks=8, n 4096, v5e, both`."""
    return f"{row['case']}, n {row['n']}, {row['chip']}, {row['direction']}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """The last line: how often the rule's choice is the slower one, by name, and how often nothing can be said."""
    slower = [name_of(r) for r in rows if r["slower"]]
    unknown = [name_of(r) for r in rows if r["rule"] == "pallas" and r["over_xla"] is None]
    said = f"The rule's choice is slower than XLA in {len(slower)} of {len(rows)} rows"
    said += "".join(f"; {name}" for name in slower) + "."
    if missed := [name_of(r) for r in rows if r["missed"]]:
        said += f" A kernel it leaves aside would be faster in {len(missed)} rows; " + "; ".join(missed) + "."
    if unknown:
        said += f" In {len(unknown)} a kernel is chosen without both estimates: " + "; ".join(unknown) + "."
    return said


def table(rows: list[dict[str, Any]], style: box.Box) -> Table:
    """Thousands of cycles; ~ marks a figure scaled from fewer tokens, + one of which the Record notes what is missing, ? one by
    cost analysis alone."""
    names = [*(f"{c} kcyc" for c in COLUMNS), "floor kcyc", "rule", "over XLA", "over dense", "FLOPs saved", "bound"]
    made = Table("product", "n", "tokens", "chip", "direction", *names, box=style)
    number = lambda value, form: "-" if value is None else format(value, form)
    for r in sorted(rows, key=lambda r: (r["direction"] == "both", r["chip"], r["n"], r["case"])):
        marks = lambda name, r=r: (
            "~" * (name in r["scaled"]) + "+" * (name in r["notes"]) + "?" * (name in r["analysed"])
        )
        cells = [marks(c) + number(r["cycles"][c] and r["cycles"][c] / 1e3, ".1f") for c in COLUMNS]
        cells += [f"{r['floor'] / 1e3:.1f}", r["rule"], number(r["over_xla"], ".2f"), number(r["speedup"], ".2f")]
        cells += [f"{r['flop_reduction']:.1f}", f"{r['bound']:.1f}"]
        made.add_row(r["case"], str(r["n"]), str(r["tokens"]), r["chip"], r["direction"], *cells)
    return made


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Why estimates are missing, one line per reason with how many share it; a rule that refuses is no failure."""
    shared: dict[str, list[str]] = {}
    for r in rows:
        for name, reason in r["why"].items():
            if r["cycles"][name] is None and not (name == "pallas" and r["unsupported"]):
                shared.setdefault(f"{name}: {reason}", []).append(name_of(r))
    return [f"- {reason} ({len(names)} rows, such as {names[0]})" for reason, names in shared.items()]


def report(rows: list[dict[str, Any]], out: Path, about: str) -> None:
    """Print the table, and write it as Markdown, under `about`, beside the Record."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(rows, box.ROUNDED))
    console.print(verdict(rows), soft_wrap=True, markup=False)
    missing = failures(rows)
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 220)
        page.print(f"# Products on TPUs: {LABEL}\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(rows, box.MARKDOWN))
        if missing:
            page.print("\nNo estimate:\n\n" + "\n".join(missing), soft_wrap=True, markup=False)
        page.print("\n" + verdict(rows), soft_wrap=True, markup=False)
