"""Pictures of matrices and results as matplotlib Figures; no pyplot, so no display and nothing global.

A notebook shows a Figure that ends a cell after `%matplotlib inline`; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from structmat.structures import Matrix, StructureError
from structmat.structures.leaf import flatten_leaves

Weight = Matrix | jax.Array | np.ndarray
Weights = Weight | Sequence[Weight] | Mapping[str, Weight]
"""One matrix, several, or label -> matrix; labels left out are the structure's text, or `dense`."""


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


def weight_image(matrices: Weights, shared: bool = True) -> Figure:
    """|W| of each matrix in a panel of its own, all on one colour scale, or not `shared` each on its own."""
    named = {label: np.abs(_dense(w)) for label, w in _labelled(matrices).items()}
    top = max(float(size.max()) for size in named.values())
    figure = Figure(figsize=(4.4 * len(named) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(named), squeeze=False)[0]
    for panel, (label, size) in zip(panels, named.items()):
        image = _image(panel, size, label, top if shared else float(size.max()))
        if not shared:
            figure.colorbar(image, ax=panel, label="|W|", shrink=0.85)
    if shared:
        figure.colorbar(image, ax=list(panels), label="|W|", shrink=0.85)
    return figure


def factor_images(matrix: Matrix) -> Figure:
    """|W| first, then every leaf of the structure: absolute values in grey, indices in colour.

    A leaf of more than two dimensions shows its matrices below one another, and one of one dimension is a row.
    """
    leaves = [name for name, _ in flatten_leaves(matrix.bound.leaves())]
    figure = Figure(figsize=(4.0 * (1 + len(leaves)), 4.0), layout="constrained")
    panels = figure.subplots(1, 1 + len(leaves), squeeze=False)[0]
    size = np.abs(_dense(matrix))
    figure.colorbar(_image(panels[0], size, matrix.structure.short(), float(size.max())), ax=panels[0], shrink=0.7)
    for panel, name in zip(panels[1:], leaves):
        value: Any = matrix.params
        for part in name.split("/"):
            value = value[part]
        array = np.asarray(value if not jnp.issubdtype(value.dtype, jnp.bfloat16) else value.astype(jnp.float32))
        flat = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        indices = np.issubdtype(array.dtype, np.integer)
        image = panel.imshow(flat if indices else np.abs(flat), cmap="viridis" if indices else "Greys", aspect="auto")
        panel.set_title(f"{name} {array.shape}", fontsize=9)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set_xlabel("last axis")
        panel.set_ylabel("other axes" if array.ndim != 1 else "")
        figure.colorbar(image, ax=panel, shrink=0.7)
    return figure


def spectrum(matrices: Weights) -> Figure:
    """Singular values of each matrix in descending order on a log axis; zeros, to rounding, are left out."""
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    panel = figure.subplots()
    for label, w in _labelled(matrices).items():
        dense = _dense(w)
        values = np.linalg.svd(dense, compute_uv=False)
        values = values[values > values[0] * max(dense.shape) * np.finfo(dense.dtype).eps]
        panel.plot(np.arange(1, len(values) + 1), values, label=label)
    panel.set_yscale("log")
    panel.set_xlabel("index")
    panel.set_ylabel("singular value")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def error_curve(curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, top: int = 10) -> Figure:
    """Error against budget on log axes, one curve per label.

    Args:
      curves: label -> (budget taken, error) points.
      top: this many are told apart, those of least error at their largest budget; the rest is grey.

    Raises:
      StructureError: there is no point.
    """
    if not any(curves.values()):
        raise StructureError("nothing to plot: no candidate fits all weights at any budget")
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    panel = figure.subplots()
    ordered = sorted((max(points)[1], label) for label, points in curves.items() if points)
    rest = [label for _, label in ordered[top:]]
    for i, label in enumerate(rest):
        x, y = zip(*sorted(curves[label]))
        panel.plot(x, y, ".-", color="0.8", lw=1, label=f"{len(rest)} others" if i == len(rest) - 1 else None)
    for i, (_, label) in enumerate(ordered[:top]):
        x, y = zip(*sorted(curves[label]))
        panel.plot(x, y, "osD^vP*Xhd"[i % 10] + "-", color=f"C{i % 10}", ms=5, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(xlabel)
    panel.set_ylabel(ylabel)
    panel.grid(alpha=0.3, which="both")
    handles, labels = panel.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: rest != [] and labels[i] == f"{len(rest)} others")
    figure.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=8, loc="outside right upper")
    return figure


def speedups(
    grid: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]],
    bounds: Mapping[str, Mapping[str, float]],
    title: str,
) -> Figure:
    """Speed-up against a size, log axes: a row of panels per direction, a line per chip, the chip's bound dashed.

    Args:
      grid: direction -> panel (`monarch: blocks`) -> chip -> (size, speed-up) points.
      bounds: direction -> chip -> the most any structure can gain.
    """
    columns = list(dict.fromkeys(panel for panels in grid.values() for panel in panels))
    figure = Figure(figsize=(3.4 * len(columns), 3.1 * len(grid) + 0.7), layout="constrained")
    axes = figure.subplots(len(grid), len(columns), sharey=True, sharex="col", squeeze=False)
    colors = {chip: f"C{i}" for i, chip in enumerate(dict.fromkeys(chip for own in bounds.values() for chip in own))}
    for row, (direction, panels) in zip(axes, grid.items()):
        row[0].set_ylabel(f"over dense, {direction}")
        for axis, name in zip(row, columns):
            for chip, points in panels.get(name, {}).items():
                axis.plot(*zip(*points), "o-", ms=4, color=colors[chip], label=chip)
                axis.axhline(bounds[direction][chip], ls="--", lw=0.8, color=colors[chip])
            axis.axhline(1, lw=0.8, color="0.5")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(alpha=0.3)
    for axis, name in zip(axes[0], columns):
        operation, _, size = name.partition(": ")
        axis.set_title(operation, fontsize=10)
        axes[-1][list(axes[0]).index(axis)].set_xlabel(size)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title, fontsize=9)
    return figure


def _image(panel: Any, size: np.ndarray, title: str, top: float) -> Any:
    image = panel.imshow(size, cmap="Greys", vmin=0, vmax=top or 1.0, interpolation="nearest")
    panel.set_title(textwrap.fill(title, 44), fontsize=9)
    panel.set_xlabel("output")
    panel.set_ylabel("input")
    return image


def _labelled(matrices: Weights) -> dict[str, Weight]:
    if isinstance(matrices, Mapping):
        named = dict(matrices)
    else:
        several = list(matrices) if isinstance(matrices, list | tuple) else [matrices]
        texts = [w.structure.short() if isinstance(w, Matrix) else "dense" for w in several]
        named = {
            t if texts.count(t) == 1 else f"{t} ({texts[:i].count(t) + 1})": w
            for i, (t, w) in enumerate(zip(texts, several))
        }
    if not named:
        raise StructureError("nothing to plot: no matrix was given")
    return named


def _dense(w: Weight) -> np.ndarray:
    """The materialised matrix in at least single precision."""
    array = jnp.asarray(w.materialize() if isinstance(w, Matrix) else w)
    if array.ndim != 2:
        raise StructureError(f"a picture needs a matrix, got an array of shape {array.shape}")
    return np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32)))
