"""Flags of one command, apart from those of others, so that several commands can be imported into one process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app
from absl import flags as absl_flags


class OwnFlags:
    """Stands in for `absl.flags`: `flags = OwnFlags()`, then `flags.DEFINE_string(...)` as ever.

    Attributes:
      FLAGS: the values defined so far.
    """

    def __init__(self) -> None:
        self.FLAGS = absl_flags.FlagValues()

    def __getattr__(self, name: str) -> Any:
        """`DEFINE_...` on these values."""
        if not name.startswith("DEFINE_"):
            raise AttributeError(name)
        return functools.partial(getattr(absl_flags, name), flag_values=self.FLAGS)

    def parse(self, parser: Callable[[], Any]) -> None:
        """Have `parser`, which reads the command line into absl's own values, read these too."""
        absl_flags.FLAGS.append_flag_values(self.FLAGS)
        parser()
        self.FLAGS.mark_as_parsed()

    def run(self, main: Callable[[Sequence[str]], Any]) -> None:
        """`absl.app.run(main)` with these flags; a wrong flag or argument is one line, and exit code 2."""
        absl_flags.FLAGS.append_flag_values(self.FLAGS)

        def start(argv: Sequence[str]) -> Any:
            self.FLAGS.mark_as_parsed()
            try:
                return main(argv)
            except app.UsageError as error:
                _refuse(error)

        app.run(start, flags_parser=_parsed)


def _parsed(argv: list[str]) -> list[str]:
    try:
        return absl_flags.FLAGS(argv)
    except absl_flags.Error as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
