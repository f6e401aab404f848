"""Flags of a command that can run as several processes, on one machine or on many hosts."""

from __future__ import annotations

import logging

from experiments.own_flags import OwnFlags
from structmat.parallel import init_distributed


class HostFlags:
    """`hosts = HostFlags(flags)`, then `hosts.join()` before anything asks jax for its devices."""

    def __init__(self, flags: OwnFlags):
        self._coordinator = flags.DEFINE_string(
            "coordinator", None, "host:port of process 0; a TPU pod and SLURM need none (or STRUCTMAT_COORDINATOR)."
        )
        self._processes = flags.DEFINE_integer(
            "processes", None, "How many processes; 1 keeps to this one on a pod, too (or STRUCTMAT_PROCESSES)."
        )
        self._process = flags.DEFINE_integer("process", None, "Which one this is, from 0 (or STRUCTMAT_PROCESS).")
        self._timeout = flags.DEFINE_integer(
            "start_timeout", 300, "Seconds to wait for all processes before those missing are named.", lower_bound=1
        )

    def join(self) -> bool:
        """Bring the processes together; whether this is the one that prints.

        Raises:
          HostsError: one is missing, or was told something wrong.
        """
        group = init_distributed(
            self._coordinator.value, self._processes.value, self._process.value, timeout=self._timeout.value
        )
        if not group.primary:
            logging.getLogger("structmat").setLevel(logging.ERROR)
        return group.primary
