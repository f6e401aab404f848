"""Training curves that grow while a notebook trains."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from IPython.display import display
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from structmat.training.loop import train
from structmat.training.record import Record


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, the progress line of training is not printed."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


class Curves:
    """Training losses of several runs in one plot, smoothed, redrawn every `every` steps.

    Args:
      steps: of the longest run. ylabel: what the loss is.

    Attributes:
      losses: label -> smoothed loss of every step so far.
    """

    def __init__(self, steps: int, ylabel: str, every: int = 25, smooth: float = 0.9):
        self.losses: dict[str, list[float]] = {}
        self._steps, self._ylabel, self._every, self._smooth = steps, ylabel, every, smooth
        self._shown = display(self.figure(), display_id=True)

    def train(self, config: ConfigDict, label: str, folder: str | Path | None = None) -> Record:
        """Train a config and draw its losses; the folder of the run is a new one if none is given."""
        folder = Path(tempfile.mkdtemp()) / "run" if folder is None else folder
        with quietly():
            return train(config, folder, name=label, on_step=self._follow(label))

    def _follow(self, label: str) -> Callable[[int, dict[str, Any]], None]:
        values = self.losses[label] = []

        def on_step(step: int, metrics: dict[str, Any]) -> None:
            last = values[-1] if values else metrics["loss"]
            values.append(self._smooth * last + (1 - self._smooth) * metrics["loss"])
            if step % self._every == 0 or step == self._steps:
                self._shown.update(self.figure())

        return on_step

    def figure(self) -> Figure:
        """The curves so far."""
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        panel = figure.subplots()
        for label, values in self.losses.items():
            panel.plot(range(1, len(values) + 1), values, label=label)
        panel.set(xlabel="step", ylabel=self._ylabel, xlim=(0, self._steps))
        panel.grid(alpha=0.3)
        if self.losses:
            panel.legend(fontsize=8)
        return figure
