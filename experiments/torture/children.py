"""Real processes that can be killed, forked from a server that has imported jax but started no backend."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

Target = Callable[..., Any]
"""(report, *args) -> None, importable by name; `report(value)` sends a picklable value to the parent."""

_FORKS = multiprocessing.get_context("forkserver")
_FIGURES = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}.") if m.name[-1] != "_"]
_FORKS.set_forkserver_preload([*_FIGURES, "experiments.train", "sklearn.datasets", "tensorboardX"])


class Child:
    """A process that runs `target(report, *args)` in its main thread.

    Args:
      log: file that gets its stdout and stderr.
      devices: CPU devices jax shall see in it.
      cache: folder of compiled programs shared with other children; None compiles all anew.
    """

    def __init__(self, target: Target, *args: Any, log: Path, devices: int = 1, cache: Path | None = None):
        self.log = log
        self._here, there = _FORKS.Pipe(duplex=False)
        self.process = _FORKS.Process(target=_run, args=(target, args, there, log, devices, cache), daemon=True)
        self.process.start()
        there.close()

    def reports(self) -> Iterator[Any]:
        """What it reports, until it ends or is killed."""
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                yield self._here.recv()

    def end(self, timeout: float = 300) -> int:
        """Its exit code; minus the signal that killed it. A process that outlives `timeout` seconds is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def tail(self, lines: int = 3) -> str:
        """The last lines of its output."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " | ".join(text.strip().splitlines()[-lines:])


def results(target: Target, *args: Any, log: Path, devices: int = 1, cache: Path | None = None) -> list[Any]:
    """All reports of a child that has to end well; raises RuntimeError with the end of its output if it does not."""
    child = Child(target, *args, log=log, devices=devices, cache=cache)
    found = list(child.reports())
    if code := child.end():
        raise RuntimeError(f"{target.__name__} ended with {code}: {child.tail(6)}")
    return found


def _run(target: Target, args: tuple[Any, ...], there: Connection, log: Path, devices: int, cache: Path | None) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        target(there.send, *args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
