"""One Markdown page with all tables that have results, and a picture per table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import box

from experiments.tables.plan import plan
from experiments.tables.results import Results, cost_of, results_of
from experiments.tables.schema import SCALES, Table
from experiments.tables.show import caption, grid, verdicts
from experiments.tables.store import Store
from structmat.analysis.pages import page_of


def report(tables: Sequence[Table], folder: Path) -> Path:
    """Write `folder`/report.md with a picture beside it for every table and scale that has a result."""
    found = with_results(tables, folder)
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        page = page_of(file, 400)
        say = lambda text="": page.print(text, soft_wrap=True, markup=False, highlight=False)
        say("# Tables of papers, at our scales\n")
        say(
            "Written by `python -m experiments.tables report`. Figures under `paper:` are the papers' own, on their data and"
        )
        say(
            "models; everything else was measured by this repository, as the lines under each table say. A claim holds, or"
        )
        say(
            "does not, where the 95% interval of the paired differences over seeds is on that side; else it is not decided.\n"
        )
        say(summary(found))
        for results in found:
            table, scale = results.plan.table, results.plan.scale
            say(f"\n## {table.name}, {scale}: {table.title}\n\n{table.citation}.\n")
            page.print(grid(results, box.MARKDOWN))
            picture = folder / f"{table.name}_{scale}.png"
            plot(results, picture)
            say(f"\n![{table.title}]({picture.name})\n")
            for paragraph in caption(results):
                say(paragraph if paragraph.startswith("- ") else f"\n{paragraph}")
            if table.extra:
                say("\n" + table.extra(results))
    return path


def with_results(tables: Sequence[Table], folder: Path) -> list[Results]:
    """Every table and scale that has a result, by scale."""
    found = [results for table in tables for scale in table.bases if (results := _with_results(table, scale, folder))]
    return sorted(found, key=lambda r: SCALES.index(r.plan.scale))


def _with_results(table: Table, scale: str, folder: Path) -> Results | None:
    store = Store(folder, scale)
    if store.empty():
        return None  # whatever data its plan needs
    results = results_of(plan(table, scale, store), store)
    return results if any(any(line.results) for line in results.lines) else None


def summary(found: Sequence[Results]) -> str:
    """How many claims hold, do not, and are undecided, by scale."""
    lines = []
    for scale in SCALES:
        every = [v.status if v else "not decided" for r in found if r.plan.scale == scale for _, v in verdicts(r)]
        if every:
            counts = Counter(every)
            lines.append(
                f"Scale {scale}: {len(every)} claims; {counts['holds']} hold, {counts['does not hold']} do not, "
                f"{counts['not decided']} are not decided."
            )
    return "\n".join(lines) or "No results yet."


def plot(results: Results, path: Path) -> Path:
    """The metric of every arm against its parameters, every seed a point and the mean a mark."""
    metric = results.plan.base.metric
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    panel = figure.subplots()
    markers = "osD^vP*Xhd<>"
    for i, line in enumerate(results.lines):
        values = line.figures(metric)
        if not values:
            continue
        if line.row.arm.reference:
            panel.axhline(statistics.fmean(values), color=f"C{i % 10}", ls=":", label=line.row.arm.name)
            continue
        params = cost_of(line.row.config).params
        panel.plot([params] * len(values), values, ".", color=f"C{i % 10}", alpha=0.4, ms=6)
        panel.plot(
            params,
            statistics.fmean(values),
            markers[i % len(markers)],
            color=f"C{i % 10}",
            ms=9,
            label=line.row.arm.name,
        )
    panel.set_xlabel("parameters of the model")
    panel.set_ylabel(f"held-out {metric.replace('_', ' ')}")
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    return path
