"""The memory a projection needs, known before it starts, so that a matrix too large is refused and not half done."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from structmat.structures.errors import StructureError

_CGROUP = Path("/sys/fs/cgroup")
_ALLOCATES = ("svd", "eigh", "qr", "geqrf", "householder_product", "lu", "dot_general", "fft", "sort", "top_k")
"""Primitives whose results are arrays in memory whatever the compiler fuses."""


def least_bytes(traced: jax.stages.Traced) -> int:
    """A lower bound that needs no compilation: the arguments beside the results, or beside the largest decomposition."""
    jaxpr = traced.jaxpr
    args = sum(_bytes(v.aval) for v in jaxpr.jaxpr.invars)
    results = sum(_bytes(v.aval) for v in jaxpr.jaxpr.outvars)
    inside = max((sum(_bytes(v.aval) for v in e.outvars) + _scratch(e) for e in _equations(jaxpr.jaxpr)), default=0)
    return args + max(results, inside)


def compiled_bytes(traced: jax.stages.Traced) -> int:
    """What the compiled program holds at its peak: arguments, results, temporaries, and the workspace of LAPACK's
    decompositions, which the compiler's own analysis does not see. Compiles, once for this and the call."""
    analysis = traced.lower().compile().memory_analysis()
    if analysis is None:  # a backend that keeps no account
        return least_bytes(traced)
    stated = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return stated + max((_scratch(e) for e in _equations(traced.jaxpr.jaxpr)), default=0)


def free_bytes(arrays: Any) -> int | None:
    """Bytes a program on `arrays` may use: what is free on their device, or on the host where the device keeps no
    count, plus what those of them that are on the device hold already. None where neither is known."""
    leaves = jax.tree.leaves(arrays)
    placed = [a for a in leaves if isinstance(a, jax.Array)]
    device = min(placed[0].sharding.addressable_devices, key=lambda d: d.id) if placed else jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        free = _host_bytes()
    return None if free is None else free + sum(_bytes(a) for a in placed)


def over(need: int, limit: int, exactly: bool, what: str, instead: list[str]) -> StructureError:
    """The refusal: what is needed, what there is, and what to do."""
    least = "" if exactly else "at least "
    choices = "; or ".join([*instead, "allow more with limit=<bytes>"])
    return StructureError(f"{what} needs {least}{_text(need)}, and the limit is {_text(limit)}; {choices}")


def _bytes(value: Any) -> int:
    """Size of an array or of its abstract value; a key counts as its words."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return 16 * math.prod(value.shape)
    return math.prod(value.shape) * value.dtype.itemsize


def _scratch(equation: Any) -> int:
    """Workspace of one decomposition of a stack, done one matrix at a time (LAPACK gesdd, syevd)."""
    factor = {"svd": 4, "eigh": 2}.get(equation.primitive.name, 0)
    operand = equation.invars[0].aval
    return factor * min(operand.shape[-2:]) ** 2 * operand.dtype.itemsize if factor else 0


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations that allocate, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in _ALLOCATES:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _host_bytes() -> int | None:
    """Memory this process could still take: the system's, or what is left of its container's."""
    found = [n for n in (_system_bytes(), _container_bytes()) if n is not None]
    return min(found, default=None)


def _system_bytes() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _container_bytes() -> int | None:
    """The container's limit less what it uses; its file cache counts as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("file", 0)))
    except (OSError, ValueError):
        return None


def _text(size: int) -> str:
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:.3g} {unit}"
    return f"{size} bytes"
