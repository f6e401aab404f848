"""Pictures of results; matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


def tradeoff(
    rows: Sequence[Mapping[str, Any]],
    axes: Sequence[tuple[str, str]],
    metric: tuple[str, str],
    path: str | Path,
    reference: tuple[str, float] | None = None,
) -> Path:
    """One panel per cost: the metric against it, a labelled point per row.

    Args:
      rows: with `label`, and the keys named by `axes` and `metric`.
      axes: (key, axis label) of each cost, shown on a log scale.
      metric: (key, axis label).
      reference: (label, value) of a horizontal line.
    """
    figure = Figure(figsize=(4.6 * len(axes), 5.0), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    markers = "osD^vP*Xhd<>"
    for panel, (key, label) in zip(panels, axes):
        for i, row in enumerate(rows):
            panel.plot(
                row[key], row[metric[0]], markers[i % len(markers)], ms=8, label=row["label"], color=f"C{i % 10}"
            )
        if reference:
            panel.axhline(reference[1], ls=":", c="gray", label=reference[0])
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(label)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel(metric[1])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
