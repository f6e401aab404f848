"""Timing of compiled functions side by side, and what their compiled programs contain."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

_OP = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = \S+ ([a-z][\w\-]*)\(")


def interleaved(
    functions: Sequence[Callable[..., Any]], arguments: Sequence[tuple[Any, ...]], repeats: int
) -> list[list[float]]:
    """Wall seconds of each function, called in turn `repeats` times after one warm-up each.

    Calls alternate A B A B, so that drift of the machine's speed falls on all alike; every call is waited for.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function, args in zip(functions, arguments):
        jax.block_until_ready(function(*args))
    for _ in range(repeats):
        for i, (function, args) in enumerate(zip(functions, arguments)):
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            times[i].append(time.perf_counter() - start)
    return times


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a / b pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))


def op_counts(compiled: Any) -> dict[str, int]:
    """How often each HLO operation occurs in a compiled program, fusions included."""
    return dict(Counter(m.group(1) for line in compiled.as_text().splitlines() if (m := _OP.match(line))))
