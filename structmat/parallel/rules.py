"""Logical axes -> mesh axes: one NamedSharding for every leaf of variables, optimiser state and batches."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from structmat.parallel.mesh import REPLICA, MeshError
from structmat.structures.errors import nearest, suggest

AxisRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: AxisRules = (
    ("batch", ("replica", "data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("kv", None),
    ("length", None),
    ("embed_act", None),
    ("features", None),
    ("classes", None),
    ("layers", None),
    ("rank", None),
    ("terms", None),
    ("block_in", None),
    ("block_out", None),
)
"""(logical axis, mesh axes). An axis may occur again: the first entry whose mesh axes are still free is taken. On a mesh
without `replica` the rules hold as if it had one part."""

SCANNED, STORAGE, LARGE = "layers", "fsdp", 2**18
"""A leaf of this many entries or more that the rules leave whole on the mesh axis of shared parameters is split over it all
the same, on a dimension it divides: a factor touches one side of its matrix only, so `embed` alone would leave half of all
factors on every device."""

log = logging.getLogger(__name__)


def spec_for(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], rules: AxisRules = DEFAULT_RULES, path: str = ""
) -> PartitionSpec:
    """The PartitionSpec, one entry per dimension, of an array with these logical axes.

    Dimensions are served from left to right, so a mesh axis already taken is not used again. A dimension that its mesh
    axes do not divide is left whole on the axes that do not fit, which is logged as a warning. A large array that no
    dimension puts on `fsdp` (`LARGE`) is split over it where it divides a dimension.

    Raises:
      MeshError: as many axes as dimensions are needed; a logical axis without rule, or a rule to an unknown mesh axis.
    """
    rules = rules_on(mesh, rules)
    if len(axes) != len(shape):
        raise MeshError(f"{path}: logical axes {axes} do not match shape {shape}")
    used: set[str] = set()
    spec: list[tuple[str, ...]] = []
    whole: list[tuple[str | None, tuple[str, ...], tuple[str, ...]]] = []
    for axis, size in zip(axes, shape):
        wanted = _lookup(axis, rules, used, path)
        fitting = _fitting(mesh, wanted, size)
        whole += [(axis, wanted, wanted[len(fitting) :])] if fitting != wanted else []
        used.update(fitting)
        spec.append(fitting)
    if math.prod(shape) >= LARGE and mesh.shape.get(STORAGE, 1) > 1 and STORAGE not in used:
        at = _storage_dimension(mesh, axes, shape, spec)
        if at is not None:
            spec[at] = (*spec[at], STORAGE)
            used.add(STORAGE)
        elif not whole:  # which says as much below
            log.warning(
                "%s: no dimension of shape %s divides by %s=%d, so every device of that axis holds it whole; a rank or "
                "width that is a multiple of %d would be split",
                path or "array",
                shape,
                STORAGE,
                mesh.shape[STORAGE],
                mesh.shape[STORAGE],
            )
    for axis, wanted, missing in whole:
        if not used.issuperset(missing):
            log.warning(
                "%s: dimension %r of shape %s is not divisible by mesh axes %s; kept whole on %s",
                path or "array",
                axis,
                shape,
                {a: mesh.shape[a] for a in wanted},
                missing,
            )
    return PartitionSpec(*(names if len(names) > 1 else names[0] if names else None for names in spec))


def _storage_dimension(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], spec: list[tuple[str, ...]]
) -> int | None:
    """The dimension to split for storage: the longest that is not split yet, else the longest at all; None if none fits."""
    parts = [math.prod(mesh.shape[a] for a in names) * mesh.shape[STORAGE] for names in spec]
    fits = [i for i, n in enumerate(shape) if axes[i] != SCANNED and n % parts[i] == 0]
    return max(fits, key=lambda i: (not spec[i], shape[i]), default=None)


def rules_on(mesh: Mesh, rules: AxisRules) -> AxisRules:
    """The rules in the mesh axes there are: `replica` is left out where the mesh lacks it.

    Raises:
      MeshError: a rule names another mesh axis the mesh lacks.
    """
    for logical, wanted in rules:
        for axis in _as_tuple(wanted):
            if axis not in mesh.axis_names and axis != REPLICA:
                raise MeshError(f"rule {logical!r} -> {axis!r}: no such mesh axis" + suggest(axis, mesh.axis_names))
    if REPLICA in mesh.axis_names:
        return rules
    left = lambda wanted: tuple(a for a in _as_tuple(wanted) if a != REPLICA) or None
    return tuple((logical, left(w) if REPLICA in _as_tuple(w) else w) for logical, w in rules)


def _lookup(axis: str | None, rules: AxisRules, used: set[str], path: str) -> tuple[str, ...]:
    if axis is None:
        return ()
    entries = [_as_tuple(wanted) for logical, wanted in rules if logical == axis]
    if not entries:
        known = dict(rules)
        raise MeshError(f"{path}: no rule for logical axis {axis!r}" + suggest(axis, known))
    return next((e for e in entries if not used.intersection(e)), ())


def _fitting(mesh: Mesh, wanted: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The longest prefix of `wanted` whose devices divide `size`."""
    while wanted and size % math.prod(mesh.shape[a] for a in wanted):
        wanted = wanted[:-1]
    return wanted


def _as_tuple(wanted: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)


def _is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The tree without Linen's partitioning boxes; adds no constraint, so it also works on abstract values."""
    return jax.tree.map(lambda node: node.value if _is_box(node) else node, tree, is_leaf=_is_box)


def path_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A jax key path as plain names."""
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(mesh: Mesh, boxed: Any, rules: AxisRules = DEFAULT_RULES) -> Any:
    """A NamedSharding for every leaf of `boxed`, in the tree of `unbox(boxed)`.

    Args:
      boxed: variables as returned by `model.init` (or its eval_shape), in LogicallyPartitioned boxes; a leaf without
        box is replicated.
    """
    rules = rules_on(mesh, rules)

    def one(path: tuple[Any, ...], node: Any) -> NamedSharding:
        if not _is_box(node):
            return _replicated(mesh, node)
        return NamedSharding(mesh, spec_for(mesh, node.names, node.value.shape, rules, "/".join(path_of(path))))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)


def state_shardings(mesh: Mesh, params_shardings: Any, abstract_state: Any) -> Any:
    """A NamedSharding for every leaf of a training state, in its tree (boxes removed).

    A leaf follows the parameter whose path ends its own (as the moments of optax do), provided it has the parameter's
    number of dimensions and is divisible likewise; all others (counts, keys, step, factored moments) are replicated.

    Args:
      params_shardings: from `shardings`, either of all variables (collections on top) or of one collection.
      abstract_state: any pytree of arrays or ShapeDtypeStructs, such as {"params": ..., "opt_state": ..., "step": ...}.
    """
    known: dict[tuple[str, ...], NamedSharding] = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(params_shardings):
        names = path_of(path)
        known[names] = sharding
        if len(names) > 1 and names[0] in ("params", "frozen"):
            known[names[1:]] = sharding

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = path_of(path)
        for start in range(len(names)):
            found = known.get(names[start:])
            if found is not None and _fits(found, leaf.shape):
                return found
        return _replicated(mesh, leaf)

    return jax.tree_util.tree_map_with_path(one, unbox(abstract_state))


def _fits(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    if len(sharding.spec) != len(shape):
        return False
    parts = (math.prod(sharding.mesh.shape[a] for a in _as_tuple(entry)) for entry in sharding.spec)
    return all(size % n == 0 for size, n in zip(shape, parts))


def _replicated(mesh: Mesh, leaf: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * np.ndim(leaf)))


def batch_sharding(mesh: Mesh, rules: AxisRules = DEFAULT_RULES) -> NamedSharding:
    """The sharding of every array of a batch: its first dimension over the mesh axes of `batch`."""
    wanted = _lookup("batch", rules_on(mesh, rules), set(), "batch")
    return NamedSharding(mesh, PartitionSpec(wanted if wanted else None))


def local_rows(mesh: Mesh, batch: int, rules: AxisRules = DEFAULT_RULES) -> range:
    """The rows of a whole batch that the devices of this process hold (the span, where they are not adjacent).

    Raises:
      MeshError: `batch` is not divisible by the devices it is spread over; names the nearest batch sizes that are.
    """
    sharding = batch_sharding(mesh, rules)
    parts = math.prod(mesh.shape[a] for a in _as_tuple(sharding.spec[0]))
    if batch < 1 or batch % parts:
        valid = nearest(batch, (parts * i for i in range(1, batch // parts + 3)), 2)
        raise MeshError(f"batch of {batch} rows cannot be spread over {parts} devices; nearest valid: {valid}")
    index = sharding.addressable_devices_indices_map((batch,)).values()
    bounds = [rows.indices(batch)[:2] for (rows,) in index]
    return range(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def shard_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], total: int | None = None, rules: AxisRules = DEFAULT_RULES
) -> dict[str, jax.Array]:
    """Global arrays, sharded as `batch_sharding`, from what this process has made; every process calls it alike.

    Args:
      batch: name -> array (rows, ...). Rows are the whole batch if `total` is None, else `local_rows(mesh, total)`.
      total: rows of the whole batch over all processes.
    """
    sharding = batch_sharding(mesh, rules)

    def one(name: str, value: np.ndarray) -> jax.Array:
        value = np.asarray(value)
        if value.ndim == 0:
            raise MeshError(f"batch[{name!r}] is a scalar; every array of a batch has its rows first")
        size = len(value) if total is None else total
        rows = local_rows(mesh, size, rules)
        rows = range(size) if total is None else rows
        if len(value) != len(rows):
            raise MeshError(
                f"batch[{name!r}] has {len(value)} rows, but this process holds rows {rows.start} to {rows.stop - 1} "
                f"of {size}"
            )

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return value[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: one(name, value) for name, value in batch.items()}


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: AxisRules = DEFAULT_RULES) -> Iterator[Mesh]:
    """Make `nn.with_logical_constraint` act: it needs both the ambient mesh and the rules, else it does nothing.

    Trace `model.init` outside of it where a weight has the same logical axis on both sides: Linen also applies the
    rules to every parameter it creates, and refuses a repeated name.
    """
    rules = rules_on(mesh, rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield mesh
