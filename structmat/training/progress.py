"""The progress line: step time, throughput, achieved FLOP/s and an ETA that does not pretend.

The first step compiles, so it counts for nothing but itself: rates and ETA come from the steps after it, and until there
are some the line says "compiling". The time spent beside the steps (evaluation, checkpoints) is in the ETA in proportion,
but not in the step time.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


@dataclass(frozen=True)
class Rates:
    """Of one run so far; None where nothing but the compiling step has been seen."""

    step: int
    total: int
    step_seconds: float | None
    eta_seconds: float | None
    compile_seconds: float | None


class Meter:
    """Clock of one run from step `start` (resumed) to `total`; pure bookkeeping over `clock()` seconds."""

    def __init__(self, total: int, start: int = 0, clock: Callable[[], float] = time.perf_counter):
        self.total, self.step, self._clock = total, start, clock
        self._began = clock()
        self._first: tuple[int, float] | None = None  # step and time at which the compiling step ended
        self._beside = 0.0

    def tick(self, step: int) -> None:
        """Step number `step` (1-based count of finished steps) is done; the first call ends the compiling step."""
        self.step = step
        if self._first is None:
            self._first, self._beside = (step, self._clock()), 0.0

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Time inside is not step time: evaluation, checkpoints, sampling."""
        began = self._clock()
        try:
            yield
        finally:
            self._beside += self._clock() - began

    @property
    def elapsed(self) -> float:
        """Seconds since the meter was made."""
        return self._clock() - self._began

    def rates(self) -> Rates:
        """What is known now."""
        if self._first is None:
            return Rates(self.step, self.total, None, None, None)
        first_step, first_time = self._first
        done, compiled = self.step - first_step, first_time - self._began
        if self.step >= self.total:
            eta: float | None = 0.0
        elif done:
            eta = (self.total - self.step) * (self._clock() - first_time) / done
        else:
            eta = None
        step_seconds = (self._clock() - first_time - self._beside) / done if done else None
        return Rates(self.step, self.total, step_seconds, eta, compiled)


class Runs:
    """The outer loop over several runs: which one this is, and how long all of them will take.

    A run still to come is taken to last as long as the mean of those finished here and the one now running (compile time
    included, because it will be paid again). Runs that were already done and are skipped cost nothing.
    """

    def __init__(self, count: int):
        self.count, self.index = count, 0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """The next run starts."""
        self.index += 1

    def skip(self) -> None:
        """The next run was done before."""
        self.index += 1

    def finish(self, seconds: float) -> None:
        """The current run took this long."""
        self._seconds.append(seconds)

    def eta(self, elapsed: float, eta: float | None) -> float | None:
        """Seconds to the end of all runs, given the current run's elapsed time and ETA; None while nothing is known."""
        known = self._seconds + ([elapsed + eta] if eta is not None else [])
        if eta is None and self._seconds:
            eta = max(0.0, sum(known) / len(known) - elapsed)
        if eta is None:
            return None
        return eta + (self.count - self.index) * sum(known) / len(known)


class ProgressLine:
    """Shows a run on stderr: one live line on a terminal, else a log line at most every `interval` seconds.

    Process 0 only. Call `tick` after every step; use `with line.beside():` around evaluation and checkpoints.

    Args:
      label: the run's name.
      total, start: last step and the step resumed from.
      per_step, unit: how many tokens or examples one step sees.
      step_flops: model FLOPs of one step, None if unknown; shown as GFLOP/s. An attribute, for a model that changes.
      peak_flops: FLOP/s of all devices together, None if unknown (a CPU); adds the utilisation.
      runs: the outer loop, `begin` already called.
      interval: seconds between log lines.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        start: int = 0,
        per_step: int = 1,
        unit: str = "examples",
        step_flops: float | None = None,
        peak_flops: float | None = None,
        runs: Runs | None = None,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.meter = Meter(total, start, clock)
        self._label = f"[{runs.index}/{runs.count}] {label}" if runs else label
        self._per_step, self._unit, self._runs = per_step, unit, runs
        self.step_flops, self._peak_flops = step_flops, peak_flops
        self._stream = stream if stream is not None else sys.stderr
        self._interval, self._clock, self._shown = interval, clock, -float("inf")
        self._shows = jax.process_index() == 0
        self._bar: Progress | None = None
        self._metrics: dict[str, float] = {}
        if self._shows and self._stream.isatty():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task(self._label, total=total, completed=start, text="compiling")
            self._bar.start()

    @property
    def beside(self) -> Callable:
        """`with line.beside():` keeps the time inside out of the step time."""
        return self.meter.beside

    def tick(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Step `step` is done; `metrics` (host floats, the latest known) are shown until newer ones come."""
        self.meter.tick(step)
        self._metrics.update(metrics or {})
        if not self._shows:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self.text())
        elif self._clock() - self._shown >= self._interval:
            self._log()

    def close(self) -> None:
        """Prints the last state as a plain line and frees the terminal line."""
        if self._bar is not None:
            self._bar.stop()
        if self._shows:
            self._log()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def text(self) -> str:
        """`step 120/600  12.3 ms/step  83.2k tokens/s  41 GFLOP/s  loss 2.91  ETA 0:12  all 3:40`."""
        rates = self.meter.rates()
        parts = [f"step {rates.step}/{rates.total}"]
        seconds = rates.step_seconds
        if seconds:
            parts += [f"{_duration_ms(seconds)}/step", f"{_short(self._per_step / seconds)} {self._unit}/s"]
            if self.step_flops is not None:
                achieved = self.step_flops / seconds
                parts.append(f"{achieved / 1e9:.3g} GFLOP/s")
                if self._peak_flops is not None:
                    parts.append(f"{achieved / self._peak_flops:.0%} of peak")
        parts += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        if rates.compile_seconds is None:
            parts.append("compiling")
        elif rates.step < rates.total:
            parts.append(f"ETA {_clock_text(rates.eta_seconds)}")
        if self._runs is not None and self._runs.count > 1:
            parts.append(f"all {_clock_text(self._runs.eta(self.meter.elapsed, rates.eta_seconds))}")
        return "  ".join(parts)

    def _log(self) -> None:
        self._shown = self._clock()
        print(f"{self._label}  {self.text()}", file=self._stream, flush=True)


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _duration_ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 999.5 or unit == "G":
            return f"{value:.3g}{unit}"
        value /= 1000
    return ""
