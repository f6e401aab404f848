"""Plan against program: what each leaf's sharding promises, what the compiled step does, and what it sends."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from structmat.parallel.rules import path_of, unbox

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One leaf of a plan: bytes over all devices (one copy) and on the fullest device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int


def plan(abstract: Any, planned: Any) -> list[LeafPlan]:
    """A LeafPlan per leaf of `abstract` (arrays or ShapeDtypeStructs, boxes allowed) under the shardings `planned`."""
    leaves = jax.tree_util.tree_leaves_with_path(unbox(abstract))
    return [
        LeafPlan(
            "/".join(path_of(path)),
            leaf.shape,
            str(leaf.dtype),
            sharding.spec,
            math.prod(leaf.shape) * leaf.dtype.itemsize,
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        )
        for (path, leaf), sharding in zip(leaves, _shardings(planned), strict=True)
    ]


def bytes_per_device(leaves: list[LeafPlan]) -> int:
    """Bytes of all leaves on one device."""
    return sum(leaf.bytes_per_device for leaf in leaves)


def replicated(leaves: list[LeafPlan], over: int = 2**20) -> list[LeafPlan]:
    """Leaves of more than `over` bytes of which every device holds all."""
    return [leaf for leaf in leaves if leaf.bytes > over and leaf.bytes_per_device == leaf.bytes]


def differences(abstract: Any, planned: Any, compiled: Any) -> list[str]:
    """One line per leaf whose compiled sharding is not the planned one; empty when the program keeps the plan.

    Args:
      abstract: the tree of arrays or ShapeDtypeStructs.
      planned: its NamedShardings, from `shardings` or `state_shardings`.
      compiled: `compiled.output_shardings` (or its part), or those of real arrays, in the same tree.
    """
    rows = zip(plan(abstract, planned), _shardings(planned), _shardings(compiled), strict=True)
    return [
        f"{leaf.path} {leaf.shape}: planned {want.spec}, compiled {getattr(have, 'spec', have)}"
        for leaf, want, have in rows
        if not have.is_equivalent_to(want, len(leaf.shape))
    ]


def _shardings(tree: Any) -> list[NamedSharding]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, jax.sharding.Sharding))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how often one runs per call, and the bytes of their results on one device."""

    count: int
    bytes: int


def collectives(hlo: str) -> dict[str, Traffic]:
    """Collective kind -> Traffic of an optimised HLO module (`compiled.as_text()`); kinds that do not occur are absent.

    A collective in a loop body counts once per iteration where the compiler knows the trip count, else once; one in a
    branch counts as if taken. What goes from slice to slice counts as the collective it was before the compiler made it
    sends and receives.
    """
    found: dict[str, Traffic] = {}
    for kind, size, times, _ in sent(hlo):
        old = found.get(kind, Traffic(0, 0))
        found[kind] = Traffic(old.count + times, old.bytes + times * size)
    return {kind: found[kind] for kind in KINDS if kind in found}


def sent(hlo: str) -> Iterator[tuple[str, int, int, str]]:
    """(kind, bytes of the results on one device, how often it runs, the instruction) of every collective of a module."""
    computations = dict(_computations(hlo))

    def visit(name: str, times: int) -> Iterator[tuple[str, int, int, str]]:
        for line in computations.get(name, ()):
            if hit := _COLLECTIVE.search(line):
                kind, phase = hit["kind"], hit["phase"]
                yield kind, _result_bytes(hit["result"], phase == "-start" and kind != "all-reduce"), times, line
            elif hit := _BETWEEN_SLICES.search(line):
                kind = "collective-permute" if hit["kind"] == "ONE_TO_ONE" else hit["kind"].lower().replace("_", "-")
                yield kind, _result_bytes(hit["result"], False), times, line
            inner = times * int(trip[1]) if (trip := _TRIPS.search(line)) else times
            for group in _CALLED.finditer(line):
                for called in re.findall(r"[\w.\-]+", group[1]):
                    yield from visit(called, inner)

    return visit(next((n for n in computations if n.startswith("ENTRY ")), ""), 1)


_COLLECTIVE = re.compile(rf"= (?P<result>.+?) (?P<kind>{'|'.join(KINDS)})(?P<phase>-start)?\(")
_BETWEEN_SLICES = re.compile(r'= \((?P<result>\S+?), .* recv\(.*_xla_megascale_transfer_type="(?P<kind>\w+)"')
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """(name, instruction lines) per computation; the entry's name starts with `ENTRY `."""
    name, lines = "", []
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            entry, head = line.startswith("ENTRY "), line.removeprefix("ENTRY ").lstrip("%")
            name, lines = ("ENTRY " if entry else "") + re.match(r"[\w.\-]+", head)[0], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _result_bytes(result: str, pair: bool) -> int:
    """Bytes of a result type; of a (operands, results, ...) pair only the second half of the arrays."""
    sizes = [_bytes(kind, dims) for kind, dims in _SHAPE.findall(result) if not pair or dims]
    return sum(sizes[len(sizes) // 2 :] if pair else sizes)


def _bytes(kind: str, dims: str) -> int:
    count = math.prod(int(d) for d in dims.split(",") if d)
    if kind == "pred":
        return count
    if kind.startswith("f8"):
        return count
    bits = int(re.search(r"\d+", kind)[0])
    return count * bits // 8
