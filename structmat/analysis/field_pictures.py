"""Pictures of predicted fields as matplotlib Figures; no pyplot, so no display and nothing global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from structmat.analysis.fields import energy_spectrum, relative_l2


def predicted_fields(truth: ArrayLike, prediction: ArrayLike, titles: Sequence[str] = ()) -> Figure:
    """A row per sample: truth and prediction on one colour scale, and their difference on its own.

    Args:
      truth, prediction: (samples, n, m); the first axis of space runs to the right, the second upwards.
      titles: of the rows; their numbers if empty.

    Raises:
      ValueError: shapes differ or are not those of samples of a plane, or there is no sample or too few titles.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.ndim != 3 or truth.shape != prediction.shape or not len(truth):
        raise ValueError(f"fields of shapes {truth.shape} and {prediction.shape}; both must be (samples >= 1, n, m)")
    titles = list(titles) or [f"sample {i}" for i in range(len(truth))]
    if len(titles) != len(truth):
        raise ValueError(f"{len(titles)} titles for {len(truth)} samples")
    errors = np.asarray(relative_l2(jnp.asarray(prediction), jnp.asarray(truth)))
    figure = Figure(figsize=(9.6, 3.0 * len(truth)), layout="constrained")
    rows = figure.subplots(len(truth), 3, squeeze=False, sharex=True, sharey=True)
    for panels, title, true, got, error in zip(rows, titles, truth, prediction, errors):
        low, high = float(min(true.min(), got.min())), float(max(true.max(), got.max()))
        difference = got - true
        top = float(np.abs(difference).max()) or 1.0
        shown = [(true, "truth", low, high), (got, "prediction", low, high)]
        shown.append((difference, f"difference, relative L2 {error:.3g}", -top, top))
        for panel, (field, name, least, most) in zip(panels, shown):
            color = "RdBu_r" if least < 0 < most else "viridis"
            if color == "RdBu_r":
                least, most = -max(-least, most), max(-least, most)
            image = panel.imshow(field.T, origin="lower", cmap=color, vmin=least, vmax=most, extent=(0, 1, 0, 1))
            panel.set_title(name, fontsize=9)
            if name != "truth":
                figure.colorbar(image, ax=panel, shrink=0.85)
        panels[0].set_ylabel(f"{title}\ny")
    for panel in rows[-1]:
        panel.set_xlabel("x")
    return figure


def field_spectra(fields: Mapping[str, ArrayLike]) -> Figure:
    """Energy per shell of wavenumbers against the wavenumber, mean over samples, log axes, a curve per label.

    Args:
      fields: label -> (..., n, n) periodic fields; grids may differ. The mean of a field (k = 0) is not shown, nor are
        wavenumbers a grid has in its corners only.

    Raises:
      ValueError: there is no field.
    """
    if not fields:
        raise ValueError("nothing to plot: no field was given")
    figure, panel = _panel("wavenumber", "energy")
    for i, (label, field) in enumerate(fields.items()):
        field = jnp.asarray(field)
        energy = np.asarray(energy_spectrum(field))
        mean = energy.reshape(-1, energy.shape[-1]).mean(0)[1 : field.shape[-1] // 2]
        panel.plot(np.arange(1, len(mean) + 1), mean, label=label, color=f"C{i % 10}", ls=("-", "--", ":")[i % 3])
    panel.set_xscale("log", base=2)
    panel.legend(fontsize=8)
    return figure


def error_in_time(times: ArrayLike, errors: Mapping[str, ArrayLike]) -> Figure:
    """Relative error against time on a log axis: mean over samples, and the range of the samples shaded.

    Args:
      errors: label -> (samples, times), as of `error_growth`.
    """
    times = np.asarray(times)
    figure, panel = _panel("time", "relative L2 error")
    for i, (label, error) in enumerate(errors.items()):
        error = np.asarray(error)
        panel.plot(times, error.mean(0), "o-", ms=3, label=label, color=f"C{i % 10}")
        panel.fill_between(times, error.min(0), error.max(0), color=f"C{i % 10}", alpha=0.15, lw=0)
    panel.xaxis.set_major_locator(MaxNLocator(8))
    panel.legend(fontsize=8)
    return figure


def _panel(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    panel = figure.subplots()
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_yscale("log")
    panel.grid(alpha=0.3, which="both")
    return figure, panel
