"""Named meshes of axes replica, data, fsdp and tensor that use every device, or an error that says what would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from structmat.structures.errors import suggest

REPLICA = "replica"
"""The one axis a mesh lacks where its size is 1."""

AXES = (REPLICA, "data", "fsdp", "tensor")
"""replica: whole replicas on other slices; data: whole replicas; fsdp: replicas that share their parameters; tensor: parts
of one product."""


class MeshError(ValueError):
    """A mesh, an axis rule or a batch does not fit the devices; the text names value, place and a valid choice."""


def mesh_shape(spec: Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """Sizes of AXES for `count` devices.

    Args:
      spec: axis -> size; axes left out are 1, one may be -1 (what is left). None is {"data": -1}.

    Raises:
      MeshError: unknown axis, a size that is no positive int, two -1, or a product other than `count`.
    """
    given = {"data": -1} if spec is None else dict(spec)
    for name in given:
        if name not in AXES:
            raise MeshError(f"mesh: unknown axis {name!r}" + suggest(str(name), AXES))
    sizes = [given.get(name, 1) for name in AXES]
    shown = _show(sizes)
    for name, size in zip(AXES, sizes):
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise MeshError(f"mesh {shown}: {name}={size!r} must be a positive int, or -1 for what is left")
    if sizes.count(-1) > 1:
        raise MeshError(f"mesh {shown}: only one axis may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        fault = f"{known} does not divide" if -1 in sizes else f"its product is {known}, not"
        raise MeshError(
            f"mesh {shown}: {fault} the number of devices, {count}, and every one must be used; "
            f"nearest valid: {_nearest(sizes, count)}"
        )
    return tuple(sizes)


def make_mesh(spec: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `mesh_shape` over `devices` (default: all, of every process), with Auto axis types.

    It has the axis `replica` only where its size is not 1. Devices are laid out along the physical links, and over several
    TPU slices only the first axis crosses between them: `replica`, or `data` without it. jax.make_mesh alone leaves surplus
    devices idle without a word, fails on sizes that split a physical axis, and defaults to Explicit axes, under which
    Linen's partitioning metadata fails.

    Raises:
      MeshError: as `mesh_shape`, or the first axis is no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(spec, len(devices))
    axes, shape = _present(AXES, sizes), _present(sizes, sizes)
    slices = slices_of(devices)
    if shape[0] % slices:
        raise MeshError(
            f"mesh {_show(sizes)}: {axes[0]}={shape[0]} must be a multiple of the {slices} slices; "
            f"nearest valid: {_nearest(sizes, len(devices), slices)}"
        )
    if slices > 1:
        inner, across = (shape[0] // slices, *shape[1:]), (slices,) + (1,) * len(shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def slices_of(devices: Sequence[Any]) -> int:
    """Over how many TPU slices, joined by the data-centre network, the devices are; 1 where they are no TPUs."""
    return len({getattr(d, "slice_index", None) for d in devices}) if devices[0].platform == "tpu" else 1


def factorisations(count: int, parts: int = len(AXES)) -> Iterator[tuple[int, ...]]:
    """Every tuple of `parts` positive ints, such as sizes of AXES, whose product is `count`."""
    if parts == 1:
        yield (count,)
        return
    for first in (d for d in range(1, count + 1) if count % d == 0):
        yield from ((first, *rest) for rest in factorisations(count // first, parts - 1))


def _nearest(sizes: Sequence[int], count: int, slices: int = 1) -> str:
    """The four valid shapes nearest to `sizes`, without replicas where none were asked for."""
    fits = lambda f: (f[0] == 1 or sizes[0] != 1) and _present(f, f)[0] % slices == 0
    return ", ".join(map(_show, sorted(filter(fits, factorisations(count)), key=lambda f: _distance(f, sizes))[:4]))


def _distance(shape: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(abs(math.log(have / want)) for have, want in zip(shape, wanted) if want > 0)


def _present(values: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
    """`values`, one for each of AXES, of the axes that a mesh of these sizes has."""
    return tuple(values[1:] if sizes[0] == 1 else values)


def _show(sizes: Sequence[Any]) -> str:
    axes, shape = _present(AXES, sizes), _present(sizes, sizes)
    return "x".join(map(str, shape)) + f" ({', '.join(f'{n}={s}' for n, s in zip(axes, shape))})"
