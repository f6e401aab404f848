"""TPU interpret mode that catches what plain interpretation hides: races, wrong `parallel` axes, unwritten memory."""

from __future__ import annotations

from typing import Any

import pytest
from jax.experimental.pallas import tpu as pltpu


def strict(cores: int = 1) -> Any:
    """Memory starts as NaN, parallel axes run in random order over `cores` cores, races are printed."""
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores)


def races(capsys: pytest.CaptureFixture[str]) -> int:
    """How many races were reported since the last call; from jax 0.12.0.1 on a race ends the call instead."""
    return capsys.readouterr().out.count("RACE DETECTED")
