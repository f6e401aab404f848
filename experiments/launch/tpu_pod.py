"""Run a command on every host of a TPU pod slice, or of several, through gcloud; again after each preemption.

    python -m experiments.launch.tpu_pod --name=llama --project=my-project --zone=us-east5-a --accelerator=v5p-128 \
        --spot --nfs=10.0.0.2:/share -- python -m experiments.train --config=configs/demo_lm.py --workdir=/mnt/shared/llama

Asks for a queued resource (or finds the one of that name), waits for it, copies the committed code (HEAD), installs it,
mounts the shared folder at /mnt/shared, and runs the command on all hosts. A run that ends without its record.json is
started again and goes on from its newest checkpoint; a slice that was preempted is asked for anew. Afterwards the
resource is deleted, unless `--keep`. It runs in the foreground: put it into tmux on a machine that stays. `--dry_run`
prints every gcloud command of it. These are tested for what they say and for their order, never against the cloud.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from experiments.launch import command_line
from experiments.launch.command_line import LaunchError
from experiments.launch.pod import MOUNT, Pod
from experiments.own_flags import OwnFlags
from structmat.structures.errors import suggest

flags = OwnFlags()
NAME = flags.DEFINE_string("name", None, "Of the queued resource and its TPU VMs.")
PROJECT = flags.DEFINE_string("project", None, "Of Google Cloud.")
ZONE = flags.DEFINE_string("zone", None, "Such as us-east5-a.")
ACCELERATOR = flags.DEFINE_string("accelerator", None, "Type and size, such as v5litepod-16, v5p-128, v6e-64.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of that accelerator, joined by the data-centre network.")
RUNTIME = flags.DEFINE_string("runtime", None, "Software of the VMs; default by the accelerator.")
SPOT = flags.DEFINE_bool("spot", False, "Cheaper machines that may be taken away.")
NFS = flags.DEFINE_string("nfs", None, "host:/folder shared by all hosts (Filestore), mounted at /mnt/shared.")
KEEP = flags.DEFINE_bool("keep", False, "Leave the resource standing, and its price, when the run is done.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and run none.")

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v6e": "v2-alpha-tpuv6e",
}
ATTEMPTS = 3  # of a command that fails on a healthy slice, or ends at once without being done
BRIEF = 600.0  # seconds; a run that ends well after more than these, but not done, was asked to stop
POLL = 30.0  # seconds
_NAME, _ZONE, _PROJECT = (
    r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?",
    r"[a-z]+-[a-z]+\d+-[a-z]",
    r"[a-z][a-z0-9.:-]{4,60}[a-z0-9]",
)
Call = Callable[[Sequence[str]], tuple[int, str]]
"""Run a command: (exit code, what it wrote to stdout)."""


def pod_of_flags(command: Sequence[str]) -> Pod:
    """The Pod of the flags.

    Raises:
      LaunchError: a value the cloud would refuse, or a workdir that not all hosts would share.
    """
    name = command_line.match("name", NAME.value, _NAME, "lower-case letters, digits and -, at most 40", "llama")
    project = command_line.match("project", PROJECT.value, _PROJECT, "not the id of a project", "my-project")
    zone = command_line.match("zone", ZONE.value, _ZONE, "not a zone", "us-east5-a")
    accelerator = ACCELERATOR.value or ""
    kind, _, size = accelerator.partition("-")
    if kind not in RUNTIMES or not re.fullmatch(r"[1-9]\d{0,4}", size):
        hint = "; v5e is called v5litepod" if kind == "v5e" else suggest(kind, RUNTIMES)
        raise LaunchError(f"--accelerator={accelerator!r}: must be type-size, such as v5p-128{hint}")
    slices = command_line.in_range("slices", SLICES.value, 1, 256)
    runtime = RUNTIME.value or RUNTIMES[kind]
    command_line.match("runtime", runtime, r"[a-z][a-z0-9-]*", "not a runtime version", RUNTIMES[kind])
    if NFS.value is not None:
        command_line.match("nfs", NFS.value, r"[A-Za-z0-9.-]+:/[\w./-]*", "must be host:/folder", "10.0.0.2:/share")
    pod = Pod(name, project, zone, accelerator, runtime, tuple(command), slices, SPOT.value, NFS.value or "")
    workdir = command_line.option_of(command, "workdir")
    if not workdir:
        raise LaunchError("the command has no --workdir=DIR, in which the launcher sees whether it is done")
    if pod.nfs and not workdir.startswith(MOUNT + "/"):
        raise LaunchError(f"--workdir={workdir!r} must be in the shared folder, such as {MOUNT}/{name}")
    if not pod.nfs and (pod.hosts > 1 or pod.spot):
        why = f"the {pod.hosts} hosts of {accelerator} share no disk" if pod.hosts > 1 else "a spot VM's disk is lost"
        raise LaunchError(f"{why}: give --nfs=host:/folder and --workdir={MOUNT}/{name}")
    return pod


def steps(pod: Pod) -> list[tuple[str, list[str]]]:
    """(what, command) in order, as one run without a mishap has them."""
    each = lambda what, make: [(f"{what} ({node}, all hosts)", make(node)) for node in pod.nodes]
    return [
        ("create", pod.create()),
        ("wait until this prints ACTIVE; FAILED and SUSPENDED: delete, create", pod.state()),
        ("pack", pod.pack()),
        *each("copy", pod.copy),
        *each("prepare", pod.prepare),
        *each("run, all slices at once", pod.run),
        ("done? else run again, from create where the slice is gone", pod.done()),
        ("delete", pod.delete()),
    ]


def drive(
    pod: Pod,
    call: Call,
    keep: bool = False,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Create, wait, copy, run, and again, until the run is done; the exit code.

    Raises:
      LaunchError: the cloud refuses, or the command fails ATTEMPTS times on a healthy slice.
    """
    failed = 0
    while failed < ATTEMPTS:
        _acquire(pod, call, wait, say)
        ready = call(pod.pack())[0] == 0 and _all(pod, call, pod.copy) and _all(pod, call, pod.prepare)
        began = clock()
        well = ready and _all(pod, call, pod.run)
        if call(pod.done())[0] == 0:
            if not keep:
                call(pod.delete())
            return 0
        if call(pod.state())[1].strip() != "ACTIVE":
            failed = 0
            say("the slice was taken away: asking for another")
        elif well and clock() - began > BRIEF:
            failed = 0
            say("the command was stopped before it was done: starting it again")
        else:
            failed += 1
            what = "the command ended, but wrote no record" if well else "the command failed"
            say(f"{what if ready else 'copying or installing failed'}: attempt {failed} of {ATTEMPTS}")
    raise LaunchError(
        f"it failed {ATTEMPTS} times on a healthy slice; its own output says why. The slice still stands: "
        f"{command_line.shown(pod.delete())}"
    )


def _acquire(pod: Pod, call: Call, wait: Callable[[float], None], say: Callable[[str], None]) -> None:
    """Return once the resource is active."""
    shown = ""
    while True:
        code, out = call(pod.state())
        state = out.strip() if code == 0 else "absent"
        if state == "ACTIVE":
            return
        if state != shown:
            say(f"{pod.name}: {state.lower().replace('_', ' ')}")
            shown = state
        if state in ("FAILED", "SUSPENDED"):
            call(pod.delete())
        elif state == "absent" and call(pod.create())[0] != 0:
            raise LaunchError(f"the queued resource was refused: {command_line.shown(pod.create())}")
        wait(POLL)


def _all(pod: Pod, call: Call, make: Callable[[str], list[str]]) -> bool:
    """Run a command on all slices at once; whether all went well."""
    with ThreadPoolExecutor(len(pod.nodes)) as pool:
        return all(code == 0 for code, _ in list(pool.map(lambda node: call(make(node)), pod.nodes)))


def _call(command: Sequence[str]) -> tuple[int, str]:
    quiet = command[4:5] == ["describe"]  # its answer is read, and it may be that there is none
    kept = subprocess.PIPE if quiet else None
    done = subprocess.run(command, stdout=kept, stderr=kept, text=True)
    return done.returncode, done.stdout or ""


def launch(command: list[str]) -> int:
    """Print the commands, or run them."""
    pod = pod_of_flags(command)
    if DRY_RUN.value:
        print(f"# {pod.slices} x {pod.accelerator}: {pod.hosts} hosts, one process each")
        for what, step in steps(pod):
            print(f"# {what}\n{command_line.shown(step)}")
        return 0
    if shutil.which("gcloud") is None:
        raise LaunchError("gcloud was not found; install the Google Cloud CLI, or --dry_run to see the commands")
    try:
        return drive(pod, _call, KEEP.value, say=lambda text: print(text, file=sys.stderr))
    except KeyboardInterrupt:
        raise LaunchError(f"stopped; the slice still stands: {command_line.shown(pod.delete())}") from None


if __name__ == "__main__":
    command_line.main(flags, launch)
