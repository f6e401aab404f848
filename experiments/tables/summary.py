"""All tables in one: what each compares, how its reference arm did beside the baselines, and what became of the claims."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from experiments.tables.results import Results
from experiments.tables.schema import DENSE, LOW_RANK, SMALL
from experiments.tables.show import verdicts

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def summary(found: Sequence[Results]) -> str:
    """Markdown: one line per table."""
    head = "| table | held-out figure | arm | its mean | dense | dense small | low rank | claims: hold, do not, undecided |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(_line, found)])


def _line(results: Results) -> str:
    table, base = results.plan.table, results.plan.base
    figures = [_mean(results, name) for name in (table.reference, DENSE, SMALL, LOW_RANK)]
    status = [v.status if v else "not decided" for _, v in verdicts(results)]
    counts = ", ".join(str(status.count(s)) for s in ("holds", "does not hold", "not decided"))
    better = "less is better" if base.lower else "more is better"
    page = f"[{table.name}](results/tables/report.md#{_anchor(results)})"
    cells = (page, f"{base.metric.replace('_', ' ')}, {better}", table.reference, *figures, counts)
    return "| " + " | ".join(cells) + " |"


def _mean(results: Results, name: str) -> str:
    lines = [line for line in results.lines if line.row.arm.name == name]
    values = lines[0].figures(results.plan.base.metric) if lines else []
    return f"{statistics.fmean(values):.3f}" if values else "-"


def _anchor(results: Results) -> str:
    """As GitHub names the heading of the table's section."""
    heading = f"{results.plan.table.name}, {results.plan.scale}: {results.plan.table.title}"
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def within(page: str, found: Sequence[Results]) -> str:
    """The page with the lines between BEGIN and END written anew.

    Raises:
      ValueError: the page lacks one of the two.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{summary(found)}\n{END}{rest.split(END)[1]}"
