"""Type checks of a recipe's arguments against their annotations."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import Any, Literal

from structmat.structures.errors import StructureError, suggest


def check_value(value: Any, hint: Any, what: str) -> Any:
    """Return `value` as `hint` (int -> float is the one conversion); a wrong type or choice is a StructureError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return check_value(value, option, what)
            except StructureError:
                continue
        raise StructureError(f"{what} must be {_show_hint(hint)}, got {value!r}")
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise StructureError(f"{what} got {value!r}" + suggest(str(value), map(str, args)))
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(check_value(v, args[0], what) for v in value)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and hint not in (float,) and type(value) is hint:
        return value
    if isinstance(hint, type) and hint not in (int, float, bool, str) and isinstance(value, hint):
        return value
    raise StructureError(f"{what} must be {_show_hint(hint)}, got {value!r}")


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Resolved field types; reading them is slow and `fit` builds thousands of members."""
    return typing.get_type_hints(cls)


def _show_hint(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_show_hint(a) for a in args)
    if origin is tuple:
        return f"a tuple of {_show_hint(args[0]).split()[-1]}s"
    if hint is type(None):
        return "None"
    known = {"int": "an int", "float": "a float", "str": "a string", "Structure": "a structure"}
    name = getattr(hint, "__name__", str(hint))
    return known.get(name, name)
