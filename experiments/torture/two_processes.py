"""The log of two processes of which one is killed, and of their resume.

    python -m experiments.torture.two_processes

Starts `experiments.launch.local --restarts=1` on a training run, kills process 1 once a checkpoint is there, and
writes what the launcher printed to results/torture/two_processes.txt. Linux only: it finds the process in /proc.
"""

from __future__ import annotations

import datetime
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from os import kill
from pathlib import Path

from experiments.launch.command_line import shown
from experiments.torture.runs import saved
from structmat.training import environment

OUT = Path("results/torture/two_processes.txt")
FOLDER = Path("runs/two_processes")
STEPS = 200
COMMAND = [
    *("python", "-m", "experiments.launch.local", "--processes=2", "--devices=2", "--restarts=1", "--"),
    *("python", "-m", "experiments.train", "--config=configs/digits.py:low_rank(rank=4)", f"--workdir={FOLDER}"),
    *(f"--config.steps={STEPS}", "--config.log_every=1", "--config.checkpoint.every=40"),
]


def main() -> None:
    """Run, kill, write."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    began, lines = time.monotonic(), [f"$ {shown(COMMAND)}"]
    stamp = lambda text: lines.append(f"{time.monotonic() - began:6.1f} s  {text}")
    command = [sys.executable if word == "python" else word for word in COMMAND]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill_one() -> None:
        while not saved(FOLDER):
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        stamp(f"# kill -9 {children[1]}, which is process 1; checkpoints: {saved(FOLDER)}")
        kill(int(children[1]), signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    assert launcher.stdout is not None
    for line in launcher.stdout:
        stamp(line.rstrip())
        print(lines[-1], flush=True)
    versions, device = environment.versions(), environment.device()
    head = [
        f"# {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {device['cpu']}, {device['cores']} cores, "
        f"jax {versions['jax']}, Python {platform.python_version()}, commit {versions.get('git', '')[:7]}, seed 0",
        "# python -m experiments.torture.two_processes",
    ]
    text = "\n".join([*head, *lines, f"# exit code {launcher.wait()}"]) + "\n"
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(text.replace(f"host {socket.gethostname()}", "host this"))


if __name__ == "__main__":
    main()
