"""Which parameters of a test run at once, and which among the long tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def mostly_long(values: Sequence[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters for pytest.mark.parametrize: those in `quick` as they are, the others marked `long`."""
    return [
        v if v in quick else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.long)
        for v in values
    ]


def thinned(values: Sequence[Any], every: int) -> list[Any]:
    """As `mostly_long`, with every second, third ... of them at once."""
    return mostly_long(values, values[::every])
