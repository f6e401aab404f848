"""SIGTERM as a question that a loop asks between its steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def listening_for_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields (step) -> whether to save and leave, agreed among all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []
    try:
        old = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    except ValueError:  # only the main thread may listen
        yield lambda step: False
        return
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, old)
