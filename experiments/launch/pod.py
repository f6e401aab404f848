"""The gcloud commands for the TPU VMs of a queued resource; pure, nothing is run here."""

from __future__ import annotations

import dataclasses
import shlex

from experiments.launch import command_line

MOUNT = "/mnt/shared"
ARCHIVE = "structmat.tar.gz"
_INSTALL = (
    f"rm -rf structmat && mkdir structmat && tar -xzf {ARCHIVE} -C structmat && python3 -m pip install --user -q uv && "
    "cd structmat && ~/.local/bin/uv venv -q --python 3.11 .venv && ~/.local/bin/uv pip install -q -e '.[tpu]'"
)


@dataclasses.dataclass(frozen=True)
class Pod:
    """What to ask for, and the commands for it; see the flags.

    Attributes:
      command: to run on every host.
    """

    name: str
    project: str
    zone: str
    accelerator: str
    runtime: str
    command: tuple[str, ...]
    slices: int = 1
    spot: bool = False
    nfs: str = ""

    @property
    def nodes(self) -> list[str]:
        """The TPU VM of each slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def hosts(self) -> int:
        """Of all slices: 8 TensorCores or 4 chips each; up to 8 chips of v5litepod and v6e share one."""
        kind, size = self.accelerator.split("-")
        chips = int(size) // 2 if kind in ("v4", "v5p") else int(size)
        return self.slices * (1 if kind in ("v5litepod", "v6e") and chips <= 8 else max(1, chips // 4))

    @property
    def record(self) -> str:
        """The file that tells that the run is done."""
        return f"{(command_line.option_of(self.command, 'workdir') or '').rstrip('/')}/record.json"

    def create(self) -> list[str]:
        """Ask for the queued resource."""
        what = [f"--accelerator-type={self.accelerator}", f"--runtime-version={self.runtime}"]
        nodes = [f"--node-id={self.name}"]
        if self.slices > 1:
            nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        return [*self._queued("create"), *what, *nodes, *(["--spot"] if self.spot else [])]

    def state(self) -> list[str]:
        """Print ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ..."""
        return [*self._queued("describe"), "--format=value(state.state)"]

    def delete(self) -> list[str]:
        """Give the resource back, with its VMs."""
        return [*self._queued("delete"), "--force", "--quiet"]

    def pack(self) -> list[str]:
        """The committed code as an archive."""
        return ["git", "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"]

    def copy(self, node: str) -> list[str]:
        """The archive to all hosts of a slice."""
        return [*self._vm("scp"), ARCHIVE, f"{node}:{ARCHIVE}", "--worker=all", *self._where]

    def prepare(self, node: str) -> list[str]:
        """Mount and install on all hosts of a slice."""
        mount = ""
        if self.nfs:
            mount = (
                f"sudo apt-get install -qq -y nfs-common && sudo mkdir -p {MOUNT} && (mountpoint -q {MOUNT} || "
                f"sudo mount -t nfs {shlex.quote(self.nfs)} {MOUNT}) && sudo chmod a+rwx {MOUNT} && "
            )
        return self._ssh(node, mount + _INSTALL)

    def run(self, node: str) -> list[str]:
        """The command on all hosts of a slice."""
        return self._ssh(node, f'cd structmat && PATH="$PWD/.venv/bin:$PATH" {command_line.shown(self.command)}')

    def done(self) -> list[str]:
        """Exit code 0 if the run is done."""
        return self._ssh(self.nodes[0], f"test -e {shlex.quote(self.record)}", worker="0")

    @property
    def _where(self) -> list[str]:
        return [f"--project={self.project}", f"--zone={self.zone}"]

    def _queued(self, verb: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self._where]

    def _vm(self, verb: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb]

    def _ssh(self, node: str, line: str, worker: str = "all") -> list[str]:
        return [*self._vm("ssh"), node, f"--worker={worker}", *self._where, f"--command={line}"]
