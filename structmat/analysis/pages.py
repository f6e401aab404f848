"""Text files written with rich."""

from __future__ import annotations

from typing import IO

from rich.console import Console


def page_of(file: IO[str], width: int) -> Console:
    """A console that writes plain text to `file`, in a notebook too, where rich would show it and write nothing."""
    return Console(file=file, width=width, force_jupyter=False, color_system=None)
