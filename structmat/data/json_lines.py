"""Texts in a file of JSON objects, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from structmat.data.errors import DataError


def texts(lines: Iterable[str | bytes], path: Path, field: str = "text") -> Iterator[str]:
    """The string `field` of every line that is not empty.

    Args:
      path: the lines' own, for errors.

    Raises:
      DataError: a line is not JSON, or has no such string; names its number.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r} line {number} is not JSON: {error}") from error
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{str(path)!r} line {number} has no string field {field!r}; found {found}")
        yield text
