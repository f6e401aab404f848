"""Start a run of several processes, leave it together, and stop with a sentence when one of them is lost."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax

from structmat.parallel.hosts import HostsError, Place, find_place
from structmat.parallel.roll_call import call_roll, own_name
from structmat.parallel.watch import Notice, Watch

LOST = 75  # EX_TEMPFAIL: nothing is wrong with this process, and the run can be started again
_GRACE = 3.0  # seconds


class Group:
    """The processes of this run, this one among them; a single process is a group of one, for which nothing here acts.

    Leave it by `close` or `abandon`, or use it as a context manager; one that ends in any other way counts as lost.
    """

    def __init__(self, place: Place):
        self.place = place
        self._watch: Watch | None = None
        self._leaving = threading.Lock()

    @property
    def primary(self) -> bool:
        """Whether this is process 0, which prints and writes."""
        return self.place.index == 0

    def join(self, timeout: float) -> None:
        """Wait for all processes and connect them; see `init_distributed`."""
        place = self.place
        about = f"python {platform.python_version()}, jax {jax.__version__}"
        self._watch = Watch(place, call_roll(place, about, timeout), self._stop)
        self._watch.start()
        local = place.host in ("127.0.0.1", "localhost")
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                cluster_detection_method="deactivate" if place.told else None,
                coordinator_bind_address=f"{place.host}:{place.port}" if local else None,
                initialization_timeout=60,
            )
        except (RuntimeError, ValueError) as error:
            reason = f"jax cannot connect the processes at {place.coordinator}: {str(error).splitlines()[0]}"
            self.abandon(HostsError(reason), f"error: {reason}", 2)

    def close(self) -> None:
        """Leave together with all others, after the work is done."""
        if self._watch is not None:
            jax.distributed.shutdown()
            self._watch.tell({"bye": True})

    def abandon(self, error: BaseException, text: str, code: int) -> None:
        """Leave because of an error: all others are told, and this process ends; returns only in a group of one.

        The text is printed unless the error is but the echo of a lost process, or process 0 has said the same.

        Args:
          text: for stderr. code: exit status; LOST where another process is the cause.
        """
        watch = self._watch
        if watch is None:
            return
        watch.known.wait(1)
        notice = watch.notice
        if notice is not None and (not notice.reason or isinstance(error, jax.errors.JaxRuntimeError)):
            self._leave(_sentence(notice), LOST)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        who = f"process {self.place.index} of {self.place.count} ({own_name()})"
        watch.tell({"sentence": f"{who} stopped: {reason}", "reason": reason})
        if not self.primary and watch.known.wait(1) and watch.notice.reason == reason:
            text = ""
        self._leave(text, code)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            self.abandon(error, "".join(traceback.format_exception(error)), 1)

    def _stop(self, notice: Notice) -> None:
        if notice.reason:
            time.sleep(_GRACE)  # the same may be wrong here, and this process about to say so
        self._leave(_sentence(notice), LOST)

    def _leave(self, text: str, code: int) -> NoReturn:
        """End this process now: jax's own way out waits for processes that will not come, and then aborts."""
        with self._leaving:
            if text:
                print(text.rstrip(), file=sys.stderr, flush=True)
            sys.stdout.flush()
            if self.primary and self._watch is not None:
                self._watch.alone.wait(_GRACE + 2)  # jax aborts the others when its service, which is here, ends
            os._exit(code)


_group = Group(Place())


def current_group() -> Group:
    """The group this process is in."""
    return _group


def init_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
) -> Group:
    """Bring the processes of a run together; call it once, before anything asks jax for its devices.

    On a TPU pod and under `srun` all arguments are found out; several processes of one machine, or of machines nobody
    knows about, need the first three, or STRUCTMAT_COORDINATOR, STRUCTMAT_PROCESSES and STRUCTMAT_PROCESS. Without any
    of these, and with `processes=1`, this is a single process and nothing happens.

    From then on a process that is lost ends all others within 30 s, each with a sentence that names it and exit code
    LOST. SIGTERM to any of them makes `train` save and all of them exit 0. The same command goes on, also with another
    number of processes.

    Args:
      coordinator: host:port of process 0. processes: how many there are. process: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      HostsError: a process is missing (named), runs other versions, or was told something wrong.
    """
    global _group
    if _group.place.count > 1:
        raise HostsError("init_distributed was called before; a process joins its group once")
    group = Group(find_place(coordinator, processes, process, timeout=int(timeout)))
    if group.place.count > 1:
        group.join(timeout)
        _group = group
    return group


def _sentence(notice: Notice) -> str:
    return f"stopped: {notice.sentence}; the same command in all processes goes on from the newest checkpoint"
