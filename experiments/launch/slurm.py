"""Submit a command as a SLURM job: one process a task, restarted from its checkpoint after preemption and time limits.

    python -m experiments.launch.slurm --nodes=4 --tasks_per_node=8 --gpus_per_task=1 --time=24:00:00 -- \
        python -m experiments.train --config=configs/demo_lm.py --workdir=/shared/runs/one

`--dry_run` prints the sbatch script and submits nothing. Two minutes before the time limit (`--notice`) and on
preemption SLURM sends SIGTERM: the run saves and exits 0. The job then queues itself again while the workdir has no
record.json, at most `--requeues` times. `srun` ends all tasks when one fails. The script is tested for what it says, not on a cluster.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments.launch import command_line
from experiments.own_flags import OwnFlags

flags = OwnFlags()
NAME = flags.DEFINE_string("name", "structmat", "Of the job.")
NODES = flags.DEFINE_integer("nodes", 1, "How many.")
TASKS = flags.DEFINE_integer("tasks_per_node", 1, "Processes on each node.")
GPUS = flags.DEFINE_integer(
    "gpus_per_task", 0, "GPUs of each process; jax expects 1 where there are several processes."
)
CPUS = flags.DEFINE_integer("cpus_per_task", 0, "CPU cores of each process; 0 leaves it to the cluster.")
TIME = flags.DEFINE_string("time", "24:00:00", "Limit of one start: minutes, hours:minutes:seconds or days-hours.")
PARTITION = flags.DEFINE_string("partition", None, "To submit to; default the cluster's.")
ACCOUNT = flags.DEFINE_string("account", None, "To charge; default the user's.")
NOTICE = flags.DEFINE_integer("notice", 120, "Seconds before the time limit at which SIGTERM comes.")
REQUEUES = flags.DEFINE_integer("requeues", 20, "How often the job may queue itself again.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the script, and submit nothing.")

_WORD = r"[A-Za-z0-9][A-Za-z0-9_.,-]*"
_TIME = r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}"


def script(command: Sequence[str]) -> str:
    """The sbatch script of the flags.

    Raises:
      LaunchError: a flag names nothing SLURM would take, or the command no --workdir.
    """
    word = lambda flag, value, example: command_line.match(flag, value, _WORD, "letters, digits, . _ -", example)
    options = {
        "job-name": word("name", NAME.value, "structmat"),
        "nodes": command_line.in_range("nodes", NODES.value, 1, 10000),
        "ntasks-per-node": command_line.in_range("tasks_per_node", TASKS.value, 1, 128),
        "time": command_line.match("time", TIME.value, _TIME, "not a time limit of SLURM", "24:00:00"),
        "signal": f"TERM@{command_line.in_range('notice', NOTICE.value, 10, 3600)}",
        "output": "%x-%j.log",
        "open-mode": "append",
    }
    if command_line.in_range("gpus_per_task", GPUS.value, 0, 16):
        options["gpus-per-task"] = GPUS.value
    if command_line.in_range("cpus_per_task", CPUS.value, 0, 1024):
        options["cpus-per-task"] = CPUS.value
    if PARTITION.value is not None:
        options["partition"] = word("partition", PARTITION.value, "gpu")
    if ACCOUNT.value is not None:
        options["account"] = word("account", ACCOUNT.value, "lab")
    requeues = command_line.in_range("requeues", REQUEUES.value, 0, 10000)
    workdir = command_line.option_of(command, "workdir")
    if not workdir:
        raise command_line.LaunchError("the command has no --workdir=DIR, in which the job sees whether it is done")
    record = shlex.quote(f"{workdir.rstrip('/')}/record.json")
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items()), "#SBATCH --requeue"]
    lines += [
        "",
        "set -u",
        f"srun --kill-on-bad-exit=1 {command_line.shown(command)}",
        "code=$?",
        f"if [ $code -eq 0 ] && [ -e {record} ]; then exit 0; fi",
        "if [ $code -eq 2 ]; then exit 2; fi  # the command was asked for something impossible",
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def launch(command: list[str]) -> int:
    """Print the script, or hand it to sbatch."""
    text = script(command)
    if DRY_RUN.value:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise command_line.LaunchError("sbatch was not found; run this on a login node, or --dry_run to see the script")
    return subprocess.run(["sbatch", f"--chdir={Path.cwd()}"], input=text, text=True).returncode


if __name__ == "__main__":
    command_line.main(flags, launch)
