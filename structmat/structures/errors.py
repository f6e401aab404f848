"""The one error type of structures, and how a wrong name is answered."""

import bisect
import difflib
from collections.abc import Iterable


class StructureError(ValueError):
    """A structure, its argument, its size or a rule is not valid; the text names value, place and a valid choice."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"` for a near miss, else the list of valid names."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}? valid: {', '.join(valid)}"
    return f"; valid: {', '.join(valid) or 'none'}"


def nearest(value: int, valid: Iterable[int], count: int = 6) -> str:
    """The `count` members of `valid` nearest to `value`, ascending, as text."""
    if isinstance(valid, range) and len(valid) > 2 * count:  # sizes may be in the billions
        middle = min(max(bisect.bisect_left(valid, value), count), len(valid) - count)
        valid = valid[middle - count : middle + count]
    near = sorted(sorted(valid, key=lambda v: abs(v - value))[:count])
    return ", ".join(map(str, near)) or "none"
