"""Rows of a table that are made one after another, kept as they finish, and gone on with by the next call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from absl import app

Row = TypeVar("Row")


def selected(rows: Iterable[Row], name_of: Callable[[Row], str], only: str) -> list[Row]:
    """Those of `rows` whose name has `only`.

    Raises:
      UsageError: none has.
    """
    rows = list(rows)
    found = [row for row in rows if only in name_of(row)]
    if not found:
        raise app.UsageError(f"--only={only!r} is in no row; the first is {name_of(rows[0])!r}")
    return found


def within(rows: Sequence[Row], minutes: float) -> Iterator[Row]:
    """`rows` one by one until `minutes` have passed since the first was asked for; says so if some are left."""
    end = time.monotonic() + 60 * minutes
    for done, row in enumerate(rows):
        if time.monotonic() >= end:
            print(f"stopped after {minutes:g} minutes with {len(rows) - done} rows to go; run again to go on")
            return
        yield row
