"""What the launchers share: `launcher --flags -- command`, wrong input answered in one line with exit code 2."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags

from experiments.own_flags import OwnFlags


class LaunchError(ValueError):
    """A value nothing should be launched with; the text names it, the rule and a valid one."""


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's own arguments, the command after `--`).

    Raises:
      LaunchError: there is no command, or something that is no flag stands before it.
    """
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:at], argv[at + 1 :]
    if not command:
        raise LaunchError(
            "give the command after --, such as -- python -m experiments.train --config=... --workdir=..."
        )
    return own, command


def main(flags: OwnFlags, launch: Callable[[list[str]], int]) -> NoReturn:
    """Read the flags, call `launch(command)`, and end with its exit code."""
    try:
        own, command = split(sys.argv[1:])
        flags.parse(lambda: absl_flags.FLAGS([sys.argv[0], *own]))
        stray = next((a for a in own if not a.startswith("-")), None)
        if stray is not None:
            raise LaunchError(f"unexpected argument {stray!r} before --; flags read --name=value")
        code = launch(command)
    except (LaunchError, absl_flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)


def match(flag: str, value: str | None, pattern: str, rule: str, example: str) -> str:
    """`value` if all of it matches the pattern.

    Raises:
      LaunchError: it does not, or is missing.
    """
    if not value:
        raise LaunchError(f"--{flag} is needed, such as --{flag}={example}")
    if not re.fullmatch(pattern, value):
        raise LaunchError(f"--{flag}={value!r}: {rule}, such as {example}")
    return value


def in_range(flag: str, value: int, low: int, high: int) -> int:
    """`value` if low <= value <= high; raises LaunchError."""
    if not low <= value <= high:
        raise LaunchError(f"--{flag}={value}: must be in {low} .. {high}")
    return value


def option_of(command: Sequence[str], name: str) -> str | None:
    """What a command's `--name=value` or `--name value` says; the last one counts."""
    found: str | None = None
    for here, after in zip(command, [*command[1:], None]):
        if here.startswith(f"--{name}="):
            found = here.partition("=")[2]
        elif here == f"--{name}":
            found = after
    return found


def shown(command: Sequence[Any]) -> str:
    """The command as a shell reads it."""
    return shlex.join(map(str, command))
