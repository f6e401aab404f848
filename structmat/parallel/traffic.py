"""What a compiled step sends over which mesh axis, and the least time that takes on a TPU's links."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from structmat.parallel.mesh import slices_of
from structmat.parallel.report import sent

_TARGET = "_xla_megascale_target"
_NAMED = re.compile(
    r"replica_groups=mesh\[(?P<mesh>.*?)\]"
    r"(?:, *device_ids=\((?:\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?|(?P<listed>[\d,]+))\))? *\{(?P<axes>.*?)\}"
)


@dataclasses.dataclass(frozen=True)
class Links:
    """One chip: `hbm` bytes of memory; bytes/s it can send, each way, over the links of its slice (`ici`) and out of it
    (`dcn`)."""

    hbm: float
    ici: float
    dcn: float


LINKS = {
    "v4": Links(32 * 2**30, 300e9, 6.25e9),
    "v5e": Links(16 * 2**30, 200e9, 3.125e9),
    "v5p": Links(95 * 2**30, 600e9, 6.25e9),
    "v6e": Links(32 * 2**30, 400e9, 6.25e9),
    "v7x": Links(96 * 2**30, 300e9, 6.25e9),
}
"""Per device as jax sees it: a v4 device is a whole chip (megacore), a v7x device half a chip. v5e, v5p and v6e are from
Google's pages on each chip (16 GB, 400 GB/s, 6.4 Tbit/s per 256 chips; 95 GB, 1200 GB/s, 50 Gbit/s; 32 GB, 800 GB/s),
where both directions of a link share the printed figure; GB of memory are taken as GiB. Links of v4 and v7x are not checked
against a page, and DCN where no page gives it (v4, v6e, v7x) is taken as 50 Gbit/s."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: such as `all-gather`. axes: mesh axes along which the devices of a group differ.
      parts: devices in a group. count: how often one runs per call. bytes: of the results, and wire: a device sends by
        the ring algorithm, per call.
      dcn: whether the devices of a group are on different slices, else they are all on one: the compiler splits a
        collective over several slices into parts of either kind.
    """

    kind: str
    axes: tuple[str, ...]
    parts: int
    count: int
    bytes: int
    wire: int
    dcn: bool = False


def traffic(hlo: str, mesh: Mesh) -> list[Sent]:
    """Every kind and set of axes in an optimised HLO module compiled for `mesh`, most bytes first."""
    found: dict[tuple[str, tuple[str, ...], bool], Sent] = {}
    for kind, size, times, line in sent(hlo):
        axes, parts = crossed(line, mesh)
        wire = {
            "all-reduce": 2 * size * (parts - 1) // parts,
            "reduce-scatter": size * (parts - 1),
            "collective-permute": size,
        }.get(kind, size * (parts - 1) // parts)
        dcn = _TARGET in line
        old = found.get((kind, axes, dcn), Sent(kind, axes, parts, 0, 0, 0, dcn))
        more = {"count": old.count + times, "bytes": old.bytes + times * size, "wire": old.wire + times * wire}
        found[kind, axes, dcn] = dataclasses.replace(old, **more)
    return sorted(found.values(), key=lambda s: -s.wire)


def crossed(line: str, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """(mesh axes a collective's groups extend along, devices in a group) of an HLO instruction.

    The program of several slices is that of one: it numbers the devices of a slice, and only the first mesh axis leaves it.
    """
    slices = slices_of(mesh.devices.flat)
    if _TARGET in line:
        return mesh.axis_names[:1], 2 if "->" in line.split(_TARGET)[1].split("_xla")[0] else slices
    groups = np.asarray(_groups(line, mesh.size // slices))
    places = np.stack(np.unravel_index(groups, mesh.devices.shape))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, v in zip(mesh.axis_names, varies) if v), groups.shape[1]


def _groups(line: str, devices: int) -> Sequence[Sequence[int]]:
    """The groups of a collective by position in the mesh; of a permutation, its pairs."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\d+,\d+", pairs[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if named := _NAMED.search(line):
        return _named_groups(*named.group("mesh", "shape", "order", "listed", "axes"))
    if re.search(r"replica_groups=(?!\{\})", line):
        raise ValueError(f"replica groups in a form that is not known here: {line.strip()[:300]}")
    return [list(range(devices))]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Device numbers as `[2,4]T(1,0)` says: 0, 1, ... in this shape, its dimensions then in that order."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _named_groups(mesh: str, ids: str | None, permuted: str | None, listed: str | None, axes: str) -> list[list[int]]:
    """Groups that XLA names by the axes of a mesh of its own: `'x'=2,'y'=4` and `'x','y':(2)2`, the part of an axis of size 2
    that is preceded by 2 of it.

    Args:
      ids, permuted: the mesh's devices as in `_iota`; or `listed` one by one; or 0, 1, ... without either.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(.+?)'=(\d+)", mesh)}
    shape, chosen = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes.items():
        before, own = (int(n) if n else None for n in parts.get(name, ("1", "1")))
        before, own = before or 1, own or size
        shape += [before, own, size // before // own]
        chosen += [False, name in parts, False]
    order = [i for i, c in enumerate(chosen) if not c] + [i for i, c in enumerate(chosen) if c]
    size = math.prod(n for n, c in zip(shape, chosen) if c)
    if listed:
        devices = np.array([int(n) for n in listed.split(",")])
    else:
        devices = _iota(ids, permuted) if ids else np.arange(math.prod(shape))
    return devices.reshape(shape).transpose(order).reshape(-1, size).tolist()


def seconds(found: Sequence[Sent], chip: str) -> float:
    """The least time the collectives take, one after the other, each device sending over all its links at once."""
    links = LINKS[chip]
    return sum(s.wire / (links.dcn if s.dcn else links.ici) for s in found)
