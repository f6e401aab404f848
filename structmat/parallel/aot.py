"""Ahead-of-time compiles for TPU topologies on a machine without TPU: does a step fit, and what does it send."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from structmat.parallel.mesh import MeshError, make_mesh
from structmat.parallel.report import Traffic, collectives
from structmat.parallel.rules import DEFAULT_RULES, AxisRules, on_mesh, unbox

EXAMPLES = "v4:2x2x1, v5e:2x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4"


@dataclasses.dataclass(frozen=True)
class Program:
    """A step compiled for a topology; all figures are of one chip's part.

    Attributes:
      device: kind of chip. devices: how many the program runs on.
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: memory; aliased outputs reuse their arguments.
      flops, bytes_accessed: the compiler's count for one call (a loop body counts once).
      collectives: kind -> count and bytes per call.
      seconds: time to compile.
      compiled: the executable, for `output_shardings` and `as_text()`.
    """

    device: str
    devices: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, Traffic]
    seconds: float
    compiled: jax.stages.Compiled = dataclasses.field(repr=False)

    @property
    def bytes(self) -> int:
        """Memory a chip needs to run the program."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes


def topology_mesh(name: str, spec: Mapping[str, int] | None = None, num_slices: int = 1) -> Mesh:
    """The mesh `make_mesh(spec)` would make on a TPU topology, of devices one can compile for but not run on.

    Args:
      name: such as `v5e:2x4`.
      spec: as in `make_mesh`.
      num_slices: slices of that topology; `replica` must be a multiple, or `data` where there are no replicas.

    Raises:
      MeshError: libtpu is missing, the topology is unknown, or the spec does not use it whole.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise MeshError(f"compiling for {name} needs libtpu, which is not installed: pip install 'structmat[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slices: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        slices["chip_config_name"] = "megacore"  # else two devices a chip, of which no mesh can be made
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **slices).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise MeshError(f"topology {name!r}: {str(error).splitlines()[0]}; names that work: {EXAMPLES}") from error
    return make_mesh(spec, devices)


def placed(abstract: Any, planned: Any) -> Any:
    """ShapeDtypeStructs that carry the planned shardings, boxes removed: arguments for `compile_for`."""
    attach = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(attach, unbox(abstract), planned)


def compile_for(
    mesh: Mesh,
    fn: Callable[..., Any],
    *args: Any,
    out_shardings: Any = None,
    donate_argnums: tuple[int, ...] = (),
    rules: AxisRules = DEFAULT_RULES,
) -> Program:
    """Compile `fn(*args)` for the devices of `mesh` (from `topology_mesh`, or real ones) and account for it.

    Args:
      fn: a function to jit, or one already jitted (then out_shardings and donate_argnums must be left alone).
      args: trees of `placed` ShapeDtypeStructs.
      out_shardings: as in jax.jit; None leaves them to the compiler.
    """
    jitted = fn
    if not hasattr(fn, "lower"):
        jitted = jax.jit(fn, out_shardings=out_shardings, donate_argnums=donate_argnums)
    elif out_shardings is not None or donate_argnums:
        raise ValueError("fn is jitted already; give out_shardings and donate_argnums to its jax.jit")
    with on_mesh(mesh, rules):
        start = time.perf_counter()
        compiled = jitted.lower(*args).compile()
        return describe(compiled, mesh, time.perf_counter() - start)


def describe(compiled: jax.stages.Compiled, mesh: Mesh, seconds: float = 0.0) -> Program:
    """The account of a program compiled for the devices of `mesh`, in `seconds`."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(compiled.as_text()),
        seconds=seconds,
        compiled=compiled,
    )
