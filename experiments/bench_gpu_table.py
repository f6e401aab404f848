"""Rates and the table of the GPU benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.products import Product
from structmat.analysis.pages import page_of

DIRECTIONS = {"forward": 1, "both": 3}
"""Products of one direction: y; y and both gradients."""
OURS = ("pallas", "xla")
COLUMNS = (*OURS, "dense", "torch", "torch_bsr", "torch_2_4")


def rates(took: dict[str, float], product: Product, direction: str, reduction: float, bound: float) -> dict[str, Any]:
    """Achieved rates of the faster of ours, and which part of min(FLOP reduction, bound) it gains over dense."""
    ours = min((took[name] for name in OURS if name in took), default=None)
    if ours is None:
        return {}
    flops, moved = DIRECTIONS[direction] * product.flops, product.bytes(direction)
    found = {"tflops": flops / ours / 1e12, "gbs": moved / ours / 1e9}
    if "dense" in took:
        gain = took["dense"] / ours
        found |= {"speedup": gain, "reached": gain / min(reduction, bound) if bound else None}
    return found


def table(rows: list[dict[str, Any]], style: box.Box) -> Table:
    """Microseconds by implementation, rates of the faster of ours and what it reaches of min(FLOPs saved, bound)."""
    names = [*(f"{c} us" for c in COLUMNS), "TFLOP/s", "GB/s", "FLOPs saved", "bound", "speed-up", "reached", "error"]
    made = Table("product", "n", "tokens", "direction", *names, box=style)
    number = lambda value, form: "-" if value is None else format(value, form)
    for r in sorted(rows, key=lambda r: (r["direction"], r["case"], r["n"], r["tokens"])):
        took = [r["seconds"].get(c) for c in COLUMNS]
        cells = [number(t and 1e6 * t, ".1f") for t in took]
        cells[3] = "torch not installed" if r["notes"].get("torch") == "torch not installed" else cells[3]
        cells += [number(r.get("tflops"), ".0f"), number(r.get("gbs"), ".0f"), number(r["flop_reduction"], ".1f")]
        cells += [number(r["bound"], ".1f"), number(r.get("speedup"), ".2f"), number(r.get("reached"), ".2f")]
        cells.append(number(max(r["error"].values(), default=None), ".1e"))
        made.add_row(r["case"], str(r["n"]), str(r["tokens"]), r["direction"], *cells)
    return made


def report(rows: list[dict[str, Any]], out: Path, about: str) -> None:
    """Print the table and write it as Markdown, under `about`, beside the Record."""
    Console(width=None if sys.stdout.isatty() else 220).print(table(rows, box.ROUNDED))
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 260)
        page.print(f"# Products on a GPU: {out.stem}\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(rows, box.MARKDOWN))
