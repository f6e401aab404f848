"""The TPU compiler's own estimate of a program's cycles, on a machine without a TPU.

libtpu writes it for every operation of a program it compiles when asked to; a process of its own asks, because the flag
is read once and some programs abort the profiler. Estimates rank programs and are no measurement: operations whose
operands XLA keeps on chip are charged no memory time, so compare `max(cycles, floor)` with the memory floor beside them.

    python -m experiments.static_cycles --chip=v5e --op=block_sparse --tokens=1024 --n=4096 --options=block=128,density=0.25
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.own_flags import OwnFlags
from experiments.products import OPS, Product, parse_options
from pallas_kernels import CHIPS

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Chips whose profiles can be written (those of v4 and v7x abort)."""
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Cycles per second behind the estimates: peak FLOP/s over FLOPs per cycle of the matrix units; v6e's is assumed."""
FLAG = "--xla_jf_dump_static_llo_profile_to="
IMPLEMENTATIONS = ("dense", "xla", "pallas")
DIRECTIONS = ("forward", "both")
WHOLE = -1
COSTS = -2
MEMORY = 14 * 2**30
"""Bytes a compile may take: the profiler's memory grows with the loops of a program, without end for some."""

flags = OwnFlags()
_CHIP = flags.DEFINE_enum("chip", "v5e", list(TOPOLOGIES), "chip to compile for")
_OP = flags.DEFINE_enum("op", "block_sparse", list(OPS), "product")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "rows of x", lower_bound=1)
_N = flags.DEFINE_integer("n", 4096, "width of the square product", lower_bound=1)
_OPTIONS = flags.DEFINE_string("options", "", "sizes of the structure, such as block=128,density=0.25")
_DIRECTION = flags.DEFINE_enum("direction", "forward", DIRECTIONS, "forward, or the product and all its gradients")
_WHICH = flags.DEFINE_list("implementations", list(IMPLEMENTATIONS), "which of dense, xla, pallas")
_LIMIT = flags.DEFINE_float("limit", 100, "seconds a compile may take")
_COMPILE = flags.DEFINE_string(
    "compile", "", "the program a child process compiles, as JSON; for this command's own use"
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Attributes:
    cycles: of the whole program, or None where the compiler gave none. why: then what happened.
    parts: cycles by operation, times the trips of the loops round it.
    idealised: GEMMs the profiler passed over; they are counted at the peak rate, so the truth is higher.
    alone: whether the profiler took the kernels only one by one, without what XLA puts round them.
    """

    cycles: int | None
    why: str = ""
    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    idealised: tuple[str, ...] = ()
    alone: bool = False


def estimate(
    product: Product, chip: str, implementation: str, direction: str = "forward", limit: float = 300
) -> Estimate:
    """Cycles of `product` compiled for one device of `chip`, in at most `limit` seconds.

    Args:
      implementation: `dense` (the same sizes as one GEMM), `xla` or `pallas`.
      direction: `forward`, or `both` for the product and all its gradients.
    """
    gathers = bool(OPS[product.op].indices)
    if gathers and implementation == "xla":
        return Estimate(None, "the profiler aborts, or takes all memory, on programs that gather by an index array")
    found = Estimate(None)
    if not (gathers and implementation == "pallas"):
        found = _profile(product, chip, implementation, direction, WHOLE, limit)
    if found.cycles or implementation != "pallas":
        return found
    kernels: dict[str, int] = {}
    for i in range(len(_kernels(product, chip, direction))):
        one = _profile(product, chip, implementation, direction, i, limit)
        if not one.cycles:
            return one
        kernels |= {f"{name} ({i})": cycles for name, cycles in one.parts.items()}
    return Estimate(sum(kernels.values()), parts=kernels, alone=True) if kernels else found


def analysed(product: Product, chip: str, implementation: str, direction: str, limit: float = 300) -> float | None:
    """Cycles by XLA's own cost analysis, which sees no kernels and overrates memory time; None where it gives nothing.

    Only its ratios say something: for one dense product of 4096 it has twice the profile's cycles.
    """
    asked = json.dumps([dataclasses.asdict(product), chip, implementation, direction, COSTS])
    try:
        run = _child(asked, limit, "")
    except subprocess.TimeoutExpired:
        return None
    found = float(run.stdout.split()[-1]) if run.returncode == 0 and run.stdout.split() else 0.0
    return found * CLOCKS[chip] if found > 0 else None


def _child(asked: str, limit: float, flag: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles what is asked for, in at most `limit` seconds, with a flag of libtpu's."""
    environment = os.environ | {
        "LIBTPU_INIT_ARGS": flag,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, "-m", "experiments.static_cycles", f"--compile={asked}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)


def _profile(product: Product, chip: str, implementation: str, direction: str, kernel: int, limit: float) -> Estimate:
    """The estimate of the whole program, or of its Pallas kernel of this number alone."""
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps([dataclasses.asdict(product), chip, implementation, direction, kernel])
        try:
            run = _child(asked, limit, FLAG + folder)
        except subprocess.TimeoutExpired:
            return Estimate(None, f"not compiled in {limit:g} s")
        if run.returncode:
            return Estimate(None, failure(run.stderr, run.returncode))
        trips = loop_trips(run.stdout)
        parts: dict[str, int] = {}
        for path in Path(folder).rglob("*_static_llo_profile.textproto"):
            name = path.name.removesuffix("_static_llo_profile.textproto")
            cycles = re.findall(r"estimated_cycles:\s*(\d+)", path.read_text(errors="ignore"))
            parts[name] = max(map(int, cycles), default=0) * trips.get(name, 1)
    # The profiler gives some output fusions no cycles at all.
    gemms = [name for name in parts if name.startswith(("fusion", "convolution"))]
    lost = tuple(name for name in gemms if not parts[name])
    if lost and kernel == WHOLE:
        each = product.gemm_flops(implementation, direction) / CHIPS[chip].flops * CLOCKS[chip] / max(len(gemms), 1)
        parts |= dict.fromkeys(lost, round(each))
    return Estimate(sum(parts.values()) or None, "" if parts else "no profile was written", parts, lost)


def failure(stderr: str, code: int) -> str:
    """Why a compile that ended with this code gave no estimate, from what it wrote."""
    if any(sign in stderr for sign in ("mmap error: 12", "MemoryError", "bad_alloc", "Cannot allocate memory")):
        return f"takes more than {MEMORY / 2**30:g} GiB"
    if "Fatal Python error: Aborted" in stderr:
        return "the profiler aborts"
    said = [line for line in stderr.splitlines() if "Error" in line or "error" in line]
    return said[-1][:300] if said else f"the profiler ended with code {code}"


def loop_trips(hlo: str) -> dict[str, int]:
    """Operation -> how often it runs, for those inside loops of known trip count, from a compiled program's text."""
    inside: dict[str, list[str]] = {}
    bodies: dict[str, int] = {}
    computation = ""
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            inside.setdefault(computation, []).append(operation[1])
            if body := re.search(r"body=%?([\w.\-]+).*known_trip_count\D+(\d+)", line):
                bodies[body[1]] = int(body[2])
    trips: dict[str, int] = {}

    def mark(computation: str, times: int) -> None:
        for operation in inside.get(computation, []):
            trips[operation] = times

    for body, times in bodies.items():
        mark(body, times)
    return trips


def _lowered(product: Product, chip: str, implementation: str, direction: str) -> tuple[Any, Any, list[Any]]:
    import jax

    from structmat.parallel import topology_mesh

    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    one = jax.sharding.Mesh(topology_mesh(TOPOLOGIES[chip]).devices.reshape(-1)[:1], ("one",))
    whole = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    function, arguments = product.program(implementation, direction)
    return one, function, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)


def _kernels(product: Product, chip: str, direction: str) -> list[Any]:
    """The equations of the Pallas kernels in the traced program."""
    import jax

    mesh, function, arguments = _lowered(product, chip, "pallas", direction)
    found: list[Any] = []

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(equation)
                continue
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    look(inner)

    with jax.set_mesh(mesh):
        look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def compile_product(product: Product, chip: str, implementation: str, direction: str, kernel: int) -> str:
    """What the child does: compile for one device of the chip's topology.

    Returns the text of the program, or with `kernel` COSTS the seconds of its cost analysis.
    """
    import jax

    mesh, function, arguments = _lowered(product, chip, implementation, direction)
    if kernel >= 0:
        equation = _kernels(product, chip, direction)[kernel]
        function = lambda *operands: equation.primitive.bind(*operands, **equation.params)
        held = arguments[0].sharding
        arguments = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=held) for v in equation.invars]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    return str(compiled.cost_analysis().get("optimal_seconds", 0.0)) if kernel == COSTS else compiled.as_text()


def main(_: Sequence[str]) -> None:
    """Estimate the product of the flags, or in a process of its own compile one program and print it."""
    if _COMPILE.value:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        fields, *rest = json.loads(_COMPILE.value)
        print(compile_product(Product(**fields), *rest))
        return
    product, chip = Product(_OP.value, _TOKENS.value, _N.value, parse_options(_OPTIONS.value)), _CHIP.value
    floor = product.floor(CHIPS[chip].bandwidth, _DIRECTION.value) * CLOCKS[chip]
    print(f"{product} on {chip}, {_DIRECTION.value}: memory floor {floor:,.0f} cycles (compiler's estimates below)")
    for implementation in _WHICH.value:
        found = estimate(product, chip, implementation, _DIRECTION.value, _LIMIT.value)
        notes = [f"{', '.join(found.idealised)} at peak rate"] * bool(found.idealised) + ["kernels alone"] * found.alone
        print(f"  {implementation:8}", f"{found.cycles:,}" if found.cycles else found.why, *notes, found.parts)


if __name__ == "__main__":
    flags.run(main)
