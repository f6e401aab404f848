"""Run a command as several processes on this machine; for CPU tests of what runs on a pod.

    python -m experiments.launch.local --processes=2 --devices=2 -- \
        python -m experiments.train --config=configs/digits.py --workdir=runs/two

Every line of output carries its process's number. A process that dies is named with how it died, and the others leave;
with `--restarts=3` all are started again, and a training run goes on from its newest checkpoint. SIGTERM or Ctrl-C goes
to all processes: a training run saves, and all exit 0. `--dry_run` prints the command of each process instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from experiments.launch import command_line
from experiments.own_flags import OwnFlags
from structmat.parallel.distributed import LOST
from structmat.parallel.hosts import COORDINATOR, COUNT, INDEX, roll_call_port

flags = OwnFlags()
PROCESSES = flags.DEFINE_integer("processes", 2, "How many.")
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices of each.")
RESTARTS = flags.DEFINE_integer("restarts", 0, "How often all are started again after one died.")
GRACE = flags.DEFINE_integer("grace", 30, "Seconds for the others to leave after one died, before they are killed.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands instead of running them.")

NOISE = re.compile(rb"\[Gloo\] Rank \d+ is connected to \d+ peer ranks")
USAGE = 2  # exit code of a command that was asked for something impossible: starting it again would not help


def launch(command: list[str]) -> int:
    """Run the command; the exit code is 0 if every process ended so, else that of the first that did not.

    A process that left because another was gone (`LOST`) counts only where no other ended badly.
    """
    count = command_line.in_range("processes", PROCESSES.value, 1, 64)
    devices = command_line.in_range("devices", DEVICES.value, 1, 64)
    restarts = command_line.in_range("restarts", RESTARTS.value, 0, 1000)
    grace = command_line.in_range("grace", GRACE.value, 0, 3600)
    if DRY_RUN.value:
        for i in range(count):
            added = environment(i, count, devices, 8476)
            print(" ".join(f"{name}={value}" for name, value in added.items()), command_line.shown(command))
        return 0
    for left in range(restarts, -1, -1):
        job = Job(command, count, devices, grace)
        code = job.run()
        if code in (0, USAGE) or job.stopped or not left:
            return code
        job.say(f"starting all {count} processes again ({left - 1} more restarts)")
    return code


def environment(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What tells a process its place; `init_distributed` and jax read it."""
    return {
        COORDINATOR: f"127.0.0.1:{port}",
        COUNT: str(count),
        INDEX: str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def free_port() -> int:
    """A port that is free on this machine together with that of its roll call."""
    for _ in range(100):
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            other.bind(("127.0.0.1", roll_call_port(port)))
            return port
    raise command_line.LaunchError("no free port was found on 127.0.0.1")


def ending(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"


class Job:
    """The processes of one start of a command.

    Attributes:
      children: the processes, in order. stopped: whether SIGTERM or Ctrl-C came.
    """

    def __init__(self, command: Sequence[str], count: int, devices: int, grace: float):
        self._command, self._count, self._devices, self._grace = list(command), count, devices, grace
        self.children: list[subprocess.Popen[bytes]] = []
        self._print = threading.Lock()
        self.stopped = False

    def run(self) -> int:
        """Start all, wait for all, and end what is left."""
        port = free_port()
        with self._listening():
            try:
                readers = [
                    self._start(i, os.environ | environment(i, self._count, self._devices, port))
                    for i in range(self._count)
                ]
                code = self._wait()
                for pair in readers:
                    for reader in pair:
                        reader.join(timeout=10)
                return code
            finally:
                self._kill()

    def say(self, text: str) -> None:
        """A line of the launcher itself, on stderr."""
        self._put(b"", text.encode() + b"\n", sys.stderr.buffer)

    def _start(self, index: int, environment: Mapping[str, str]) -> list[threading.Thread]:
        try:
            # of its own session, so that Ctrl-C reaches it as SIGTERM, once
            child = subprocess.Popen(
                self._command,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise command_line.LaunchError(f"{self._command[0]!r} cannot be started: {error.strerror}") from None
        self.children.append(child)
        threads = []
        for source, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)):
            assert source is not None
            threads.append(threading.Thread(target=self._copy, args=(index, source, target), daemon=True))
            threads[-1].start()
        return threads

    def _copy(self, index: int, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            if not NOISE.match(line):
                self._put(f"[{index}] ".encode(), line if line.endswith(b"\n") else line + b"\n", target)

    def _put(self, prefix: bytes, line: bytes, target: IO[bytes]) -> None:
        with self._print, contextlib.suppress(BrokenPipeError):
            target.write(prefix + line)
            target.flush()

    def _wait(self) -> int:
        """Until all have ended; after a first bad end the others get `grace` seconds."""
        code, until, ours = 0, float("inf"), False
        running = dict(enumerate(self.children))
        while running:
            for i in [i for i, child in running.items() if child.poll() is not None]:
                ended = running.pop(i).returncode
                if ended and not code:
                    code, until = ended, time.monotonic() + self._grace
                    rest = f"; {len(running)} more have {self._grace:g} s to leave" if running else ""
                    self.say(f"process {i} of {self._count} {ending(ended)}{rest}")
                elif ended and ended != code:
                    if code == LOST and not ours:  # a survivor can be reaped before the process it lost
                        code = ended
                    self.say(f"process {i} of {self._count} {ending(ended)}")
            if running and time.monotonic() > until:
                self.say(f"process {', '.join(map(str, running))} did not leave and is killed")
                self._kill()
                until, ours = float("inf"), True
            time.sleep(0.05)
        return code if code >= 0 else 128 - code

    def _kill(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def forward(number: int, frame: object) -> None:
            self.stopped = True
            for child in self.children:
                if child.poll() is None:
                    child.terminate()

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    command_line.main(flags, launch)
