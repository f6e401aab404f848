"""Where the blocks of a block-sparse matrix lie: static patterns with the same number of blocks in every block column.

A pattern on a grid of `rows` x `columns` blocks is an int32 array (columns, k) of block rows, ascending in each column.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from structmat.structures.factors import divisors


def pattern_counts(pattern: str, rows: int, columns: int) -> list[int]:
    """The numbers of blocks per column, ascending, that a pattern can have on this grid."""
    if pattern == "butterfly":
        nodes = math.gcd(rows, columns)
        return [rows // nodes * n for n in np.cumsum([1, *(f - 1 for f in _primes(nodes))]).tolist()]
    least = -(-rows // columns) if pattern == "banded" else 1
    return list(range(least, rows + 1))


@functools.lru_cache(maxsize=256)
def static_rows(pattern: str, rows: int, columns: int, count: int) -> np.ndarray:
    """The support of `butterfly` or `banded` with `count` blocks per column, one of `pattern_counts`."""
    found = (_butterfly if pattern == "butterfly" else _banded)(rows, columns, count)
    found = np.sort(found, axis=1).astype(np.int32)
    found.setflags(write=False)
    return found


def _primes(n: int) -> list[int]:
    """Prime factors with multiplicity, ascending."""
    if n == 1:
        return []
    least = divisors(n)[1]
    return [least, *_primes(n // least)]


def _butterfly(rows: int, columns: int, count: int) -> np.ndarray:
    """Flat butterfly: the union of the butterfly factors of the lowest strides.

    On gcd(rows, columns) nodes, written in the mixed radix of its prime factors (binary for a power of two, as in the
    paper), a node reads itself and the nodes that differ from it in one of the lowest digits. Each node is then
    stretched to rows / gcd block rows and columns / gcd block columns.
    """
    nodes = math.gcd(rows, columns)
    node = np.arange(nodes)
    reads, stride, tall = [node], 1, rows // nodes
    for radix in _primes(nodes):
        if len(reads) * tall == count:
            break
        digit = node // stride % radix
        reads += [node + ((digit + step) % radix - digit) * stride for step in range(1, radix)]
        stride *= radix
    stretched = np.stack(reads, axis=1)[:, :, None] * tall + np.arange(tall)
    return np.repeat(stretched.reshape(nodes, count), columns // nodes, axis=0)


def _banded(rows: int, columns: int, count: int) -> np.ndarray:
    """`count` consecutive block rows, wrapped round, centred on the diagonal of the grid scaled to rows x columns."""
    column = np.arange(columns)
    start = ((2 * column + 1) * rows - (count - 1) * columns) // (2 * columns)
    return (start[:, None] + np.arange(count)) % rows
