"""Kernels under a mesh: the product of a site on the parts every device holds.

The compiler does not partition a custom kernel, so where a kernel's rule would take one device's part of the product, the
call is wrapped in `jax.shard_map` with the specs of the site. All other products are left to the compiler.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.chips import current_chip
from pallas_kernels.dispatch import asking, partitioned
from structmat.structures import Bound
from structmat.structures.leaf import Axes, Leaf, first_axis, map_leaves

IN, OUT = "in", "out"
REPLICA = "replica"
"""The mesh axis of whole replicas on other slices (`structmat.parallel.mesh`)."""

Specs = tuple[Any, PartitionSpec, PartitionSpec, tuple[str, ...]]
"""Of the leaves, of x, of y, and the mesh axes to sum over."""


def kernel_specs(
    bound: Bound, params: Any, x: jax.Array, in_axes: Axes, out_axes: Axes
) -> tuple[Specs | tuple[()] | None, float | None]:
    """How kernels would run x `(..., d_in)` -> `(..., d_out)`, and at which efficiency: on these parts of the ambient mesh,
    `()` for on the whole as no mesh is in the way, or (None, None) where no rule takes a kernel or the family cannot be
    split like this.

    Rows are split over the mesh axes of `batch`, over which weights are gathered if they are sharded there too (as FSDP
    does); the other axes split the sides of the matrix as the logical rules say, if the family takes them so
    (`Bound.splits`). A split input ends in one sum over its axes.
    """
    if current_chip().platform == "cpu":
        return None, None
    specs: Specs | tuple[()] | None = ()
    if partitioned():
        rules = nn.get_logical_axis_rules()
        specs = site_specs(bound, x.shape, in_axes, out_axes, rules) if rules else None
    found = [] if specs is None else _efficiencies(bound, params, x, specs)
    return (specs, min(found)) if found else (None, None)


def run(bound: Bound, params: Any, x: jax.Array, specs: Specs | tuple[()] | None) -> jax.Array:
    """The product under `jax.shard_map` with these specs, or as it is without."""
    if not specs:
        return bound.matmul(params, x)
    of_params, of_x, of_y, summed = specs

    def part(params: Any, x: jax.Array) -> jax.Array:
        y = bound.matmul(params, x)
        return jax.lax.psum(y, summed) if summed else y

    return jax.shard_map(part, in_specs=(of_params, of_x), out_specs=of_y, check_vma=False)(params, x)


def within_replica(bound: Bound, params: Any, in_axes: Axes, out_axes: Axes) -> Any:
    """`params` gathered over the mesh axes of `batch`, before they are used; as they are on a mesh without replicas.

    Left to itself the compiler may lay out weights over the replicas for a lookup or a scatter, and send them from slice to
    slice.
    """
    if not _on_replicas():
        return params
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    rows = _mesh_axes("batch", rules)

    def place(leaf: Leaf) -> PartitionSpec:
        names: list[tuple[str, ...]] = []
        for axis, size in zip(leaf.axes, leaf.shape):
            held = tuple(a for a in _mesh_axes(axis, rules) if a not in rows and a not in sum(names, ()))
            names.append(held if size % math.prod(mesh.shape[a] for a in held) == 0 else ())
        return PartitionSpec(*(held or None for held in names))

    return jax.tree.map(
        jax.lax.with_sharding_constraint, dict(params), map_leaves(place, bound.leaves(in_axes, out_axes))
    )


def _on_replicas() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    free = {n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    return REPLICA in free and bool(nn.get_logical_axis_rules())


def site_specs(bound: Bound, shape: tuple[int, ...], in_axes: Axes, out_axes: Axes, rules: Any) -> Specs | None:
    """The specs of a site on the ambient mesh; None where the family cannot be split like this."""
    mesh = jax.sharding.get_abstract_mesh()
    wide = lambda names: tuple(a for a in names if a in mesh.axis_names and mesh.shape[a] > 1)
    whole = lambda n, names: n % math.prod(mesh.shape[a] for a in names) == 0
    rows = wide(_mesh_axes("batch", rules))
    free = lambda axes: tuple(a for a in wide(_mesh_axes(first_axis(axes), rules)) if a not in rows)
    ins = free(in_axes)
    outs = tuple(a for a in free(out_axes) if a not in ins)
    paired = "paired" in bound.splits
    leaves = bound.leaves(IN, OUT)
    named = {axis for leaf in jax.tree.leaves(leaves, is_leaf=lambda n: isinstance(n, Leaf)) for axis in leaf.axes}
    if paired:
        ins, outs = ins or outs, ()
    else:
        ins, outs = (ins if IN in named else ()), (outs if OUT in named else ())
        if (ins and IN not in bound.splits) or (outs and OUT not in bound.splits):
            return None
    rows = rows if len(shape) > 1 and whole(shape[0], rows) else ()
    fits = whole(bound.d_in, ins) and whole(bound.d_out, ins if paired else outs)

    def spec(leaf: Leaf) -> PartitionSpec:
        nonlocal fits
        names = [ins if axis == IN else outs if axis == OUT else () for axis in leaf.axes]
        fits = fits and all(whole(n, held) for n, held in zip(leaf.shape, names))
        return PartitionSpec(*(held or None for held in names))

    of_params = map_leaves(spec, leaves)
    if not fits:
        return None
    middle = [None] * (len(shape) - 2)
    lead = [rows or None, *middle] if len(shape) > 1 else []
    of_x, of_y = (PartitionSpec(*lead, last or None) for last in (ins, ins if paired else outs))
    return of_params, of_x, of_y, () if paired else ins


def _mesh_axes(name: str | None, rules: Any) -> tuple[str, ...]:
    """Mesh axes of a logical one: those of its first rule."""
    return _names(next((held for logical, held in rules if logical == name), None))


def _names(held: Any) -> tuple[str, ...]:
    """The entry of a rule or of a spec as a tuple of mesh axes."""
    return () if held is None else (held,) if isinstance(held, str) else tuple(held)


def _efficiencies(bound: Bound, params: Any, x: jax.Array, specs: Specs | tuple[()]) -> list[float]:
    """Of the kernels that rules take for one device's part."""
    mesh = jax.sharding.get_abstract_mesh()

    def part(value: jax.Array, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        split = [math.prod(mesh.shape[a] for a in _names(held)) for held in spec]
        return jax.ShapeDtypeStruct([n // k for n, k in zip(value.shape, split)], value.dtype)

    if specs:
        params, x = jax.tree.map(part, dict(params), specs[0]), part(x, specs[1])
    with asking() as asked:
        jax.eval_shape(bound.matmul, params, x)
    return [choice.efficiency for _, choice in asked if choice.implementation == "pallas"]
