"""JSON that any reader accepts and that gives back the same bits."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any, place: str = "value") -> Any:
    """`value` as dicts, lists, strings, numbers, booleans and None.

    Mappings, ConfigDicts (anything with to_dict), tuples, numpy and jax scalars and small arrays are converted; NaN and the infinities become the strings
    "NaN", "Infinity", "-Infinity" (the protobuf JSON mapping), because JSON has no such numbers. Python's repr of a float
    round-trips, so every finite float is exact. Raises TypeError naming the place of anything else.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(float(value))]
        )
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        value = value if isinstance(value, Mapping) else value.to_dict()
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}; keys must be strings")
        return {key: plain(v, f"{place}.{key}") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{place}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if array.dtype.kind == "V":  # bfloat16 and other extension floats
            array = array.astype(np.float32)
        if array.dtype.kind in "biufUS":
            return plain(array.tolist(), place)
    raise TypeError(f"{place} is a {type(value).__name__}, which has no JSON form")


def number(value: Any) -> float:
    """The float behind a JSON number, boolean or one of the three strings; raises ValueError for anything else."""
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def canonical(value: Any) -> str:
    """One text per value: sorted keys, no spaces; what hashes are taken of."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
