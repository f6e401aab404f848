"""New structures for the sites of a trained model: each changed weight is materialised and projected, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from structmat.nn import Site, site_params, sites
from structmat.nn.sites import bind
from structmat.structures import Bound, Rules, StructureError, flatten_leaves
from structmat.structures.stacks import solve
from structmat.surgery.layers import Piece, by_layer, named, rebuild


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of one site.

    Attributes:
      old, new: structures in their canonical text.
      error: |W - W'| / |W| in Frobenius norm between the matrices before and after; 0 where W is zero.
      params_before, params_after: stored real numbers.
    """

    old: str
    new: str
    error: float
    params_before: int
    params_after: int


def reassign(model: nn.Module, rules: Any, *example: Any) -> nn.Module:
    """The model with other structures at the sites that rules match; the others keep theirs.

    Args:
      model: with all structures assigned, as by `structmat.nn.assign`.
      rules: anything `Rules.of` reads (a bare structure is for sites of kind `linear`), or layer path -> structure.

    Raises:
      StructureError: a rule matches nothing, or a structure does not fit a site; names the site.
    """
    table = sites(model, *example)
    if isinstance(rules, Mapping):
        rules = [(re.escape(path), structure) for path, structure in rules.items()]
    matched = Rules.of(rules).matched({path: site.kind for path, site in table.items()})
    bounds = {p: bind(p, site, matched[p]) if p in matched else site.bound for p, site in table.items()}
    return model.clone(structures=tuple((path, bound.structure) for path, bound in bounds.items()))


def restructured(
    model: nn.Module, rules: Any, variables: Mapping[str, Any], *example: Any, key: jax.Array | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Change]]:
    """A model on one device with other structures at the sites that rules match: `reassign` and `restructure` in one.

    Args:
      variables: collections `params` and, if any, `frozen` of the model. example: what it is called on, shapes are enough.
      key: for families that draw a support.

    Returns:
      The model, its variables, and what became of every changed site by its layer path.

    Raises:
      StructureError: as `reassign` and `restructure`.
    """
    after = reassign(model, rules, *example)
    template = nn.unbox(jax.eval_shape(after.init, jax.random.key(0), *example))
    whole = lambda held: {"params": {}, "frozen": {}, **held}
    before = sites(model, *example)
    return after, *restructure(before, sites(after, *example), whole(variables), whole(template), key)


def restructure(
    old: Mapping[str, Site],
    new: Mapping[str, Site],
    variables: Mapping[str, Any],
    template: Mapping[str, Any],
    key: jax.Array | None = None,
) -> tuple[dict[str, Any], dict[str, Change]]:
    """The variables of a model whose sites have other structures.

    A changed site is `new.project(old.materialize(params))`, one layer at a time and each on every device of the mesh;
    so the model stays the same function, to rounding, where the new structure can be the old matrix. All other leaves
    (unchanged sites, biases, norms, positions) keep their bits; those whose group of layers is the same are not copied.

    Args:
      old, new: sites of the model before and after; the same paths and sizes.
      variables: collections `params` and `frozen` of the model before.
      template: those of the model after, as ShapeDtypeStructs; with shardings where the arrays lie on a mesh.
      key: for families that draw a support.

    Returns:
      The variables, and what became of every changed site by its layer path.

    Raises:
      StructureError: other paths or sizes, a complex matrix for a real structure, or one that cannot be projected.

    Examples:
      >>> from structmat.models import MLP
      >>> x, rules = jnp.ones((1, 16)), "layers_1 -> low_rank(rank=4)"
      >>> old = MLP(depth=2, width=16)
      >>> new = reassign(old, rules, x)
      >>> variables = nn.meta.unbox(old.init(jax.random.key(0), x))
      >>> template = nn.meta.unbox(jax.eval_shape(new.init, jax.random.key(0), x))
      >>> found, changes = restructure(sites(old, x), sites(new, x), variables, template)
      >>> {path: (change.params_before, change.params_after) for path, change in changes.items()}
      {'layers_1': (256, 128)}
      >>> new.apply(found, x).shape
      (1, 10)
    """
    _check_tables(old, new)
    everywhere, held = _everywhere(template), by_layer(dict(template))
    given: dict[str, Piece] = {}
    changes, errors = {}, {}
    for number, (path, after) in enumerate(new.items()):
        before = old[path]
        if before.bound == after.bound:
            continue
        w = _dense(before.bound, everywhere, site_params(variables, path, before))
        own = None if key is None else jax.random.fold_in(key, number)
        try:
            params = solve(after.bound, w, key=own)
        except StructureError as error:
            raise StructureError(f"site {path}: {error}") from None
        errors[path] = _error(after.bound, w, params)
        leaves = _by_path(path, after.bound, params)
        places = tuple(_place_of(*held[leaf]) for leaf in leaves)
        given |= {leaf: (array, None) for leaf, array in zip(leaves, _placed(places, tuple(leaves.values())))}
        texts = str(before.bound.structure), str(after.bound.structure)
        changes[path] = Change(*texts, 0.0, before.bound.params, after.bound.params)
    found = jax.device_get(errors)
    changes = {path: dataclasses.replace(change, error=float(found[path])) for path, change in changes.items()}
    return rebuild(dict(variables), dict(template), given), changes


def changed_params(table: Mapping[str, Site], changes: Collection[str]) -> set[str]:
    """Layer paths, within `params`, of the trainable leaves of these sites."""
    return {
        f"{path}/{name}"
        for path in changes
        for name, leaf in flatten_leaves(table[path].bound.leaves())
        if leaf.trainable
    }


def _check_tables(old: Mapping[str, Site], new: Mapping[str, Site]) -> None:
    for path in [*old, *(p for p in new if p not in old)]:
        before, after = old.get(path), new.get(path)
        shown = "; ".join(
            f"{when}: {site.kind + ' ' + repr(site.bound) if site else 'no such site'}"
            for when, site in (("before", before), ("after", after))
        )
        if not before or not after or _sizes(before) != _sizes(after):
            raise StructureError(f"site {path}: surgery keeps paths and sizes; {shown}")
        if before.bound.is_complex and not after.bound.is_complex:
            raise StructureError(f"site {path}: a complex matrix has no real structure; {shown}")


def _sizes(site: Site) -> tuple[Any, ...]:
    return site.kind, site.bound.in_shape, site.bound.out_shape


def _by_path(path: str, bound: Bound, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays of one site by their layer paths in the variables."""
    leaves = dict(flatten_leaves(bound.leaves()))
    collection = {name: "params" if leaf.trainable else "frozen" for name, leaf in leaves.items()}
    return {f"{collection[name]}/{path}/{name}": array for name, array in named(params).items()}


def _everywhere(template: Any) -> NamedSharding | None:
    """A copy on every device of the template's mesh; None where it has none."""
    found = (leaf.sharding for leaf in jax.tree.leaves(template))
    mesh = next((s.mesh for s in found if isinstance(s, NamedSharding)), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def _place_of(leaf: Any, index: int | None) -> NamedSharding | None:
    """Where one layer of a leaf goes before it is stacked: what stays on every device is one matrix at a time."""
    if not isinstance(leaf.sharding, NamedSharding):
        return None
    spec = leaf.sharding.spec
    return NamedSharding(leaf.sharding.mesh, spec if index is None else PartitionSpec(*spec[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _placed(places: tuple[NamedSharding | None, ...], arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    constrain = jax.lax.with_sharding_constraint
    return [array if place is None else constrain(array, place) for array, place in zip(arrays, places)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(bound: Bound, place: NamedSharding | None, params: Mapping[str, Any]) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        w = bound.materialize(params)
    return w if place is None else jax.lax.with_sharding_constraint(w, place)


@functools.partial(jax.jit, static_argnums=0)
def _error(bound: Bound, w: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        size, off = jnp.linalg.norm(w), jnp.linalg.norm(w - bound.materialize(params))
    return jnp.where(size > 0, off / jnp.where(size > 0, size, 1), off)
