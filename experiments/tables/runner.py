"""Runs what a table still needs, one run after another, until the time is up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments.tables.plan import Run, data_hash, plan
from experiments.tables.schema import Table
from experiments.tables.store import Store
from structmat.structures import Rules
from structmat.training.errors import Interrupted, RunError
from structmat.training.loop import train
from structmat.training.record import Record


def share_programs(folder: Path) -> None:
    """Keep compiled programs in `folder`/programs, for the seeds of an arm to share; a cache jax has already stays as it is."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))


def run_table(table: Table, scale: str, store: Store, folder: Path, seconds: float) -> bool:
    """Train what is missing, rates first; whether the table is complete.

    A run under way when the time is up is saved, and goes on at the next call.

    Args:
      folder: for runs under way; a finished run's folder is removed, as its record is in the store.
      seconds: after which to stop.
    """
    until = time.monotonic() + seconds
    while todo := missing(table, scale, store):
        for i, run in enumerate(todo):
            left = until - time.monotonic()
            if left <= 0 or not execute(run, store, folder, left):
                print(f"{table.name}: stopped when the time was up, with at least {len(todo) - i} runs to go")
                return False
    return True


def missing(table: Table, scale: str, store: Store) -> list[Run]:
    """Runs that can be named and have no result yet: what rates are still unknown decides others later."""
    return [run for run in plan(table, scale, store).runs() if store.read(run.key) is None]


def execute(run: Run, store: Store, folder: Path, seconds: float) -> bool:
    """Train one run and keep its result, or save it when the time is up; whether it ended.

    A run that stops on non-finite losses is a result too: it is kept with its error.
    """
    place = folder / store.scale / run.key
    began = time.perf_counter()
    try:
        with _stopped_after(seconds):
            record = train(run.config, place, name=run.label)
    except Interrupted:
        return False
    except RunError as error:
        if "non-finite" not in str(error):
            raise
        record = _failed(run, str(error), time.perf_counter() - began)
    store.write(run.key, record)
    shutil.rmtree(place, ignore_errors=True)
    return True


def _failed(run: Run, error: str, seconds: float) -> Record:
    return Record.create(
        name=run.label,
        kind="train",
        config=json.loads(run.config.to_json()),
        structures={"": Rules.of(run.config.structure)},
        seed=run.config.seed,
        data_hash=data_hash(run.config),
        seconds=seconds,
        metrics={"failed": error.splitlines()[0]},
    )


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """SIGTERM to this process when the time is up, which `train` answers by saving."""
    if seconds == float("inf"):
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda number, frame: None)  # one that comes too late ends nothing
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, old)
