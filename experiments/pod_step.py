"""The real training step of a config, compiled for a TPU topology on a machine without TPUs, and its account."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from pallas_kernels import Chip
from pallas_kernels.chips import chip_of
from structmat.parallel import (
    LINKS,
    Sent,
    bytes_per_device,
    describe,
    differences,
    on_mesh,
    plan,
    topology_mesh,
    traffic,
)
from structmat.parallel.traffic import seconds
from structmat.training.build import lower_step, optimizer_for, step_for
from structmat.training.config import validate
from structmat.training.methods import rule_for
from structmat.training.state import plan_state
from structmat.training.task import Task

_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.I)
_EXCEEDS = re.compile(r"required for ([\w ]+) \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_KERNEL = re.compile(r"%?([\w.\-]+) = .*custom_call_target=\"tpu_custom_call\"")


VERSION = 2
"""Of what is counted in a compiled program. 1 took groups that XLA names by a mesh of its own for all devices, so that over
several mesh axes bytes were put on too many axes, and too many of them."""


@dataclasses.dataclass(frozen=True)
class Pod:
    """Where to compile for: `topology` such as v5p:8x8x8, and `slices` of it."""

    topology: str
    slices: int = 1

    def __str__(self) -> str:
        return self.topology + (f" x {self.slices} slices" if self.slices > 1 else "")


@dataclasses.dataclass(frozen=True)
class Account:
    """One compiled step; memory, FLOPs and bytes are of one device, as jax sees it, unless said otherwise.

    Attributes:
      pod, devices, chip: what it was compiled for. mesh: axis -> size.
      params: of the model. dense_params: of the same model with dense sites.
      state: bytes of parameters, moments and the rest of the state as planned.
      fits: whether the compiler placed the program in memory. hbm: bytes of memory it may use.
      arguments, temporaries, peak: bytes; what the program holds at most. With `fits` False, peak is what it would need.
      model_flops: of a training step over all devices, by the structures' algorithms, or by the path taken where that needs
        fewer (a sum of many Kronecker terms is multiplied as one matrix). flops: executed ones, with those of
        recomputed activations.
      sent: collectives by kind and mesh axes. kernels: Pallas kernel -> how often it occurs in the program.
      off_plan: leaves whose compiled sharding is not the planned one.
      compute, memory, network: least seconds of arithmetic, of moving arguments and outputs once, and of all collectives.
      lower_seconds, compile_seconds: of this machine. program: hash of what was compiled.
    """

    pod: str
    devices: int
    chip: str
    mesh: dict[str, int]
    params: int
    dense_params: int
    state: int
    fits: bool
    hbm: int
    arguments: int
    temporaries: int
    peak: int
    model_flops: float
    flops: float
    sent: list[Sent]
    kernels: dict[str, int]
    off_plan: list[str]
    compute: float
    memory: float
    network: float
    lower_seconds: float
    compile_seconds: float
    program: str

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Bounds of the model-FLOPs utilisation: all communication hidden behind arithmetic, and none of it.

        None where the step does not fit: what it would move is not known then.
        """
        if not self.fits:
            return None
        ideal = self.model_flops / self.flops * self.compute
        hidden = max(self.compute, self.memory, self.network)
        return ideal / hidden, ideal / (max(self.compute, self.memory) + self.network)

    def row(self) -> dict[str, Any]:
        """The account as JSON holds it, with the bounds of utilisation as `mfu`, and the version that counted."""
        return json.loads(json.dumps(dataclasses.asdict(self) | {"mfu": self.mfu, "version": VERSION}))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step traced for a pod, before it is compiled."""

    config: ConfigDict
    task: Task
    pod: Pod
    mesh: jax.sharding.Mesh
    chip: Chip
    template: Any
    lowered: jax.stages.Lowered
    seconds: float
    program: str


def lower(config: ConfigDict, pod: Pod) -> Lowered:
    """Trace the step of a config for a pod.

    Raises:
      ConfigError: the config is not valid on that many devices.
      MeshError: no such topology, or libtpu is missing.
    """
    start = time.perf_counter()
    whole = topology_mesh(pod.topology, None, pod.slices)
    task = validate(config, whole.size)
    mesh = topology_mesh(pod.topology, config.mesh.to_dict(), pod.slices)
    device = mesh.devices.flat[0]
    tx, schedule = optimizer_for(config, task)
    rule = rule_for(config, task.table)
    template = plan_state(task, tx, rule, mesh)
    with on_mesh(mesh):
        lowered = lower_step(task, step_for(config, task, tx, rule, schedule), template, mesh)
    text = "\n".join([str(pod), importlib.metadata.version("libtpu"), lowered.as_text()])
    program = hashlib.sha256(text.encode()).hexdigest()[:16]
    chip = chip_of(device.device_kind, device.platform, device.num_cores or 1)
    return Lowered(config, task, pod, mesh, chip, template, lowered, time.perf_counter() - start, program)


def account(step: Lowered) -> Account:
    """Compile a traced step, and account for it; a program that does not fit gives an account with `fits` False."""
    places = jax.tree.map(lambda leaf: leaf.sharding, step.template)
    task, mesh, chip = step.task, step.mesh, step.chip
    links = LINKS[chip.name]
    state = bytes_per_device(plan(step.template, places))
    forward = 3 * task.units
    again = 4 / 3 if step.config.model.get("remat", "none") == "full" else 1.0
    flops = forward * task.flops(executed=True) * again
    start = time.perf_counter()
    facts: dict[str, Any]
    try:
        with on_mesh(mesh):
            compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        need, limit = too_large(str(error), state)
        facts = dict(
            fits=False,
            hbm=limit,
            arguments=state,
            temporaries=need - state,
            peak=need,
            sent=[],
            kernels={},
            off_plan=[],
            memory=0.0,
            network=0.0,
        )
    else:
        program, text = describe(compiled, mesh), compiled.as_text()
        found = traffic(text, mesh)
        facts = dict(
            fits=True,
            hbm=int(links.hbm),
            arguments=program.argument_bytes,
            temporaries=program.temp_bytes,
            peak=program.bytes,
            sent=found,
            kernels=kernels(text),
            off_plan=differences(step.template, places, compiled.output_shardings[0]),
            memory=(program.argument_bytes + program.output_bytes) / chip.bandwidth,
            network=seconds(found, chip.name),
        )
    dense = sum(site.bound.dense_params - site.bound.params for site in task.table.values())
    return Account(
        pod=str(step.pod),
        devices=mesh.size,
        chip=chip.name,
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        params=task.params,
        dense_params=task.params + dense,
        state=state,
        model_flops=float(forward * useful_flops(task)),
        flops=float(flops),
        compute=flops / mesh.size / chip.flops,
        lower_seconds=step.seconds,
        compile_seconds=time.perf_counter() - start,
        program=step.program,
        **facts,
    )


def useful_flops(task: Task) -> int:
    """FLOPs of a forward pass per unit, by the structures' algorithms or by the paths taken, whichever are fewer."""
    return min(task.flops(), task.flops(executed=True))


def too_large(message: str, state: int) -> tuple[int, int]:
    """(bytes needed, bytes there are) from the compiler's refusal of a program with so large a state.

    Raises:
      RuntimeError: the compiler refuses for another reason.
    """
    size = lambda number, unit: round(float(number) * _UNIT[unit.upper()])
    if found := _USED.search(message):
        return size(*found.group(1, 2)), size(*found.group(3, 4))
    if found := _EXCEEDS.search(message):
        beside = state if "temporaries" in found[1] else 0
        return size(*found.group(2, 3)) + beside, size(*found.group(4, 5))
    raise RuntimeError(message)


def kernels(text: str) -> dict[str, int]:
    """Name -> occurrences of the Pallas kernels in an optimised HLO module."""
    return dict(Counter(re.sub(r"\.\d+$", "", name) for name in _KERNEL.findall(text)))


def advice(found: Account, config: Mapping[str, Any], slices: int = 1) -> list[str]:
    """What to change so that a step that does not fit on that many slices does, most promising first."""
    said = []
    shard = found.mesh["fsdp"] * found.mesh["tensor"]
    replica, data = found.mesh.get("replica", 1), found.mesh["data"]
    apart = 1 if replica > 1 else slices
    most = found.devices // replica // apart
    if found.state > 0.5 * found.hbm:
        held = f"the state takes {found.state / 2**30:.1f} GiB of every chip, in {shard} parts"
        chips = math.ceil(found.state * shard / (0.6 * found.hbm))
        if chips <= most:
            over = f"all {most}" if most == found.devices else f"the {most} of a replica"
            said.append(f"{held}: --config.mesh.data={apart} --config.mesh.fsdp=-1 spreads it over {over}")
        else:
            said.append(f"{held}: it needs about {chips} chips, or fewer parameters by another --config.structure")
    if config["model"].get("remat", "none") != "full":
        said.append("--config.model.remat=full recomputes activations in the backward pass")
    if config["batch"] > replica * data * found.mesh["fsdp"]:
        said.append(f"a smaller --config.batch than {config['batch']}, or more devices, makes activations fewer")
    if found.mesh["tensor"] == 1:
        said.append("--config.mesh.tensor=4 splits every product, weights and activations")
    return said or ["a larger topology"]
