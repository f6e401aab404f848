"""Which process of how many this is, and where process 0 answers: from arguments, the environment or the cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

COORDINATOR, COUNT, INDEX = "STRUCTMAT_COORDINATOR", "STRUCTMAT_PROCESSES", "STRUCTMAT_PROCESS"
"""Environment variables that name process 0's host:port, the number of processes, and this one, from 0."""


class HostsError(RuntimeError):
    """The processes of a run cannot be brought together; the text says which one is missing or what is wrong."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of a run.

    Attributes:
      index: from 0. count: of all processes.
      coordinator: host:port where process 0 starts jax's coordination service; "" for a single process.
      told: whether arguments or the environment said so, not the cluster.
    """

    index: int = 0
    count: int = 1
    coordinator: str = ""
    told: bool = True

    @property
    def host(self) -> str:
        """Of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of jax's coordination service."""
        return int(self.coordinator.rpartition(":")[2])

    @property
    def roll_call_port(self) -> int:
        """Of process 0's roll call: 4096 above, or below from 32768 on: neighbouring jobs of SLURM stay apart."""
        return roll_call_port(self.port)


def roll_call_port(port: int) -> int:
    """See `Place.roll_call_port`."""
    return port + 4096 if port < 32768 else port - 4096


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 300,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """The place of this process: from arguments, else STRUCTMAT_* variables, else what jax finds out of the cluster.

    jax knows TPU pods (also of several slices), SLURM steps, Open MPI and Kubernetes. Where nothing says otherwise, and
    for `processes=1`, this is a single process.

    Args:
      coordinator: host:port of process 0. processes: how many there are. process: which one this is, from 0.
      timeout: seconds to wait until the name of process 0's host is known.

    Raises:
      HostsError: a value is missing or wrong; names it and where it came from.
    """
    coordinator = coordinator or environment.get(COORDINATOR) or None
    count, count_from = _number(processes, COUNT, "--processes", environment)
    index, index_from = _number(process, INDEX, "--process", environment)
    if count is not None and count < 1:
        raise HostsError(f"{count_from}={count}: the number of processes must be at least 1")
    if count == 1 and index in (None, 0):
        return Place()
    if (coordinator, count, index) == (None, None, None):
        return _of_cluster(timeout)
    for name, flag, value in ((COORDINATOR, "--coordinator", coordinator), (COUNT, "--processes", count)):
        if value is None:
            raise HostsError(f"several processes were asked for, but not {flag} (or {name}), which all of them need")
    if index is None:
        raise HostsError(f"{count_from}={count}, but which one this is was not said: --process (or {INDEX}), from 0")
    if not 0 <= index < count:
        raise HostsError(f"{index_from}={index}: with {count} processes it must be in 0 .. {count - 1}")
    host, colon, port = coordinator.rpartition(":")
    if not (colon and host and port.isdecimal() and 1024 <= int(port) < 65536):
        raise HostsError(
            f"--coordinator={coordinator!r} must be host:port of process 0 with a port in 1024 .. 65535, "
            "such as 10.0.0.2:8476"
        )
    return Place(index, count, coordinator)


def _number(given: int | None, name: str, flag: str, environment: Mapping[str, str]) -> tuple[int | None, str]:
    """The number and where it came from."""
    if given is not None:
        return given, flag
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise HostsError(f"{name}={text!r} must be a number from 0 on")
    return (int(text) if text else None), name


def _of_cluster(timeout: int) -> Place:
    from jax._src.clusters import ClusterEnv  # has no public name; jax.distributed.initialize asks it the same

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [0], None, timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise HostsError(f"this looks like a cluster, but jax cannot make out its processes: {error}") from error
    coordinator, count, index, _ = found
    if coordinator is None or count is None or index is None or count == 1:
        return Place()
    return Place(index, count, coordinator, told=False)
