"""Several processes of one run, each a child that can be killed; they meet as those of the train command."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.launch.local import free_port
from experiments.torture.children import Child, Target
from experiments.torture.runs import Tiny
from structmat.parallel import init_distributed

Place = tuple[str, int, int]
"""host:port of process 0, number of processes, which one."""


@dataclasses.dataclass(frozen=True)
class Laid(Tiny):
    """A Tiny on a mesh: sizes of (data, fsdp, tensor)."""

    mesh: tuple[int, int, int] = (-1, 1, 1)

    def config(self) -> ConfigDict:
        """As Tiny's, with its mesh."""
        config = super().config()
        config.mesh.update(dict(zip(("data", "fsdp", "tensor"), self.mesh)))
        return config


class Group:
    """Children that run `target(report, *args)` together, each after it has joined the others.

    Args:
      count, devices: processes, and CPU devices of each.
      logs: folder for their output.
      cache: see Child.
    """

    def __init__(self, target: Target, *args: Any, count: int, devices: int, logs: Path, cache: Path | None = None):
        logs.mkdir(parents=True, exist_ok=True)
        at = f"127.0.0.1:{free_port()}"
        make = lambda i: Child(
            member, (at, count, i), target, args, log=logs / f"{i}.log", devices=devices, cache=cache
        )
        self.members = [make(i) for i in range(count)]

    def end(self, timeout: float = 300) -> list[int]:
        """Their exit codes; those that outlive the time-out are killed."""
        until = time.monotonic() + timeout
        return [child.end(max(until - time.monotonic(), 0.1)) for child in self.members]

    def finish(self) -> list[Any]:
        """The reports of process 0; raises RuntimeError unless all end well."""
        found = list(self.members[0].reports())
        codes = self.end(60)
        if any(codes):
            raise RuntimeError(f"processes ended with {codes}: " + " / ".join(child.tail() for child in self.members))
        return found


def member(report: Callable[[Any], None], place: Place, target: Target, args: tuple[Any, ...]) -> None:
    """Join, run the target, and leave as a command does: exit codes, sentences on stderr, only process 0 reports."""
    from experiments import cli
    from experiments.own_flags import OwnFlags

    def main() -> None:
        group = init_distributed(*place, timeout=120)
        target(report if group.primary else lambda value: None, *args)

    sys.argv = ["train"]
    cli.run(main, OwnFlags())
