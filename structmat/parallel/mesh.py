"""Named meshes of axes data, fsdp and tensor that use every device, or an error that says what would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from structmat.structures.errors import suggest

AXES = ("data", "fsdp", "tensor")
"""data: whole replicas; fsdp: replicas that share their parameters; tensor: parts of one product."""


class MeshError(ValueError):
    """A mesh, an axis rule or a batch does not fit the devices; the text names value, place and a valid choice."""


def mesh_shape(spec: Mapping[str, int] | None, count: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) for `count` devices.

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
        near = sorted(factorisations(count), key=lambda f: _distance(f, sizes))[:4]
        raise MeshError(
            f"mesh {shown}: {fault} the number of devices, {count}, and every one must be used; "
            f"nearest valid: {', '.join(map(_show, near))}"
        )
    return tuple(sizes)


def make_mesh(spec: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `mesh_shape` over `devices` (default: all, of every process), with Auto axis types.

    Devices are laid out along the physical links, and over several TPU slices only `data` crosses between them.
    jax.make_mesh alone leaves surplus devices idle without a word, fails on sizes that split a physical axis, and
    defaults to Explicit axes, under which Linen's partitioning metadata fails.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(spec, len(devices))
    slices = len({getattr(d, "slice_index", None) for d in devices}) if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise MeshError(f"mesh {_show(shape)}: data={shape[0]} must be a multiple of the {slices} slices")
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def factorisations(count: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) whose product is `count`."""
    for a in (d for d in range(1, count + 1) if count % d == 0):
        for b in (d for d in range(1, count // a + 1) if (count // a) % d == 0):
            yield a, b, count // a // b


def _distance(shape: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(abs(math.log(have / want)) for have, want in zip(shape, wanted) if want > 0)


def _show(sizes: Sequence[Any]) -> str:
    return "x".join(map(str, sizes)) + f" ({', '.join(f'{n}={s}' for n, s in zip(AXES, sizes))})"
