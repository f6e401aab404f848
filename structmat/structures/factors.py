"""Splitting a size into factors: divisors, and the most even product of a given number of factors."""

from __future__ import annotations

import functools
import math

from structmat.structures.errors import StructureError, nearest
from structmat.structures.leaf import Axes, Shape, first_axis


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def count_primes(n: int) -> int:
    """Number of prime factors of n with multiplicity."""
    count, p = 0, 2
    while p * p <= n:
        while n % p == 0:
            n, count = n // p, count + 1
        p += 1
    return count + (n > 1)


@functools.lru_cache(maxsize=4096)
def even_factors(n: int, count: int) -> tuple[int, ...] | None:
    """The `count` factors >= 2 of n with the smallest sum (the most even ones), descending; None if there are none."""
    if count == 1:
        return (n,) if n > 1 else None
    splits = []
    for d in divisors(n)[1:-1]:
        rest = even_factors(n // d, count - 1)
        if rest is not None:
            splits.append(tuple(sorted((d, *rest), reverse=True)))
    return min(splits, key=lambda s: (sum(s), s), default=None)


def need_factors(n: int, count: int, name: str, what: str) -> tuple[int, ...]:
    """`even_factors`, or an error naming the nearest sizes that do split.

    Raises:
      StructureError: n has fewer than `count` prime factors; a factor of 1 would be a core that mixes nothing.
    """
    factors = even_factors(n, count)
    if factors is None:
        near = {*range(max(2, n - 64), n + 65), 2**count}
        valid = [v for v in near if count_primes(v) >= count]
        raise StructureError(
            f"{name}: {what}={n} has {count_primes(n)} prime factors and cannot be split into {count}; "
            f"nearest sizes that work: {nearest(n, valid)}"
        )
    return factors


def side_factors(shape: Shape, count: int, name: str, what: str) -> Shape:
    """The axes of a side as a tensor sees them: several axes as they are, a plain one split into `count`, ascending.

    Raises:
      StructureError: a plain side that has no such split.
    """
    return shape if len(shape) > 1 else need_factors(shape[0], count, name, what)[::-1]


def side_axes(axes: Axes, count: int) -> tuple[str | None, ...]:
    """Logical axis names of `count` factors of a side: one each where given so, else the first factor's alone."""
    if isinstance(axes, tuple) and len(axes) == count:
        return axes
    return (first_axis(axes), *(None,) * (count - 1))
