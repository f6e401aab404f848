"""Metrics of a run: always `metrics.jsonl`, and TensorBoard events beside it; written by process 0 only."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from structmat.training.plain_json import number, plain

FILE = "metrics.jsonl"


class MetricWriter:
    """One JSON object a line, `{"step": 3, "loss": 1.5}`; floats are exact, NaN is the string "NaN".

    Lines of steps after `resume_step` are dropped on opening, and so is a line cut short by a kill: a resumed run leaves
    the file of an uninterrupted one. For that the loop writes what belongs to a step before it saves that step.

    Args:
      workdir: folder for metrics.jsonl and events.
      resume_step: the restored step; None starts empty (nothing was saved, so nothing in the file will be continued).
      tensorboard: write event files under `<workdir>/tensorboard` too.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None = None, tensorboard: bool = True):
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        kept = [] if resume_step is None else [row for row in _rows(path) if row["step"] <= resume_step]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        beside.replace(path)
        self._file = path.open("a")
        if tensorboard:
            import tensorboardX

            purge = 0 if resume_step is None else resume_step + 1
            self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=30)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a line and flushes it; values are scalars (Python, numpy or jax). Raises ValueError naming one that is not."""
        if self._file is None:
            return
        row = plain(metrics, "metrics")
        for name, value in row.items():
            try:
                number(value)
            except ValueError as e:
                raise ValueError(f"metric {name!r} at step {step} must be a scalar number: {e}") from e
        if "step" in row:
            raise ValueError(f"metric 'step' at step {step}: the name is taken by the step itself")
        self._file.write(json.dumps({"step": int(step), **row}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, number(value), int(step))

    def close(self) -> None:
        """Flushes and closes both files."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The rows of `<workdir>/metrics.jsonl` in order, as floats (step as int); an unfinished last line is left out."""
    return [{k: v if k == "step" else number(v) for k, v in row.items()} for row in _rows(Path(workdir) / FILE)]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines as stored; raises ValueError naming a line before the last that is not a metrics row."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number_, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError(f"step is {row['step']!r}")
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path} line {number_} is not a metrics row: {e!r}") from e
        rows.append(row)
    return rows
