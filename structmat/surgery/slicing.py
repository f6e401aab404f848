"""Ordered sites cut to fewer components, and then to factors, or dense matrices, of just those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.nn import Site, site_params, sites
from structmat.structures import Structure, StructureError
from structmat.structures.dense import Dense
from structmat.structures.errors import suggest
from structmat.structures.low_rank import LowRank
from structmat.structures.ordered import BoundOrdered, importance
from structmat.structures.ordered_cut import cut_widths
from structmat.surgery.layers import Piece, rebuild
from structmat.surgery.restructure import reassign

Variables = Mapping[str, Any]


def widths_of(table: Mapping[str, Site], variables: Variables) -> dict[str, int]:
    """The width of every ordered site by its layer path.

    Raises:
      StructureError: the model has none.
    """
    found = _ordered(table)
    return {
        path: int(site_params({"frozen": variables["frozen"]}, path, site)["width"]) for path, site in found.items()
    }


def widths_within(table: Mapping[str, Site], variables: Variables, budget: int) -> dict[str, int]:
    """Widths with the least important components of all ordered sites cut, until these sites, as `sliced` stores them,
    have at most `budget` numbers. Nothing is trained again.

    Raises:
      StructureError: the model has no ordered site, or one component of each is too much.
    """
    found = _ordered(table)
    held = {path: site_params(variables, path, site) for path, site in found.items()}
    bounds = [site.bound for site in found.values()]

    @jax.jit
    def left(held: list[Any]) -> jax.Array:
        widths = jnp.stack([params["width"] for params in held])
        return cut_widths(bounds, widths, [importance(params["a"], params["b"]) for params in held], budget)

    return dict(zip(found, np.asarray(left(list(held.values()))).tolist()))


def with_widths(table: Mapping[str, Site], variables: Variables, widths: Mapping[str, int]) -> dict[str, Any]:
    """The variables with smaller widths at some ordered sites: the model that `sliced` would store, in the same shapes.

    Raises:
      StructureError: no such ordered site, or a width that is not from 1 to the one it has.
    """
    now = widths_of(table, variables)
    for path, width in widths.items():
        if path not in now:
            raise StructureError(f"no ordered site {path!r}" + suggest(path, now))
        if not 1 <= width <= now[path]:
            raise StructureError(f"site {path}: width {width} must be from 1 to {now[path]}, which it has")
    given: dict[str, Piece] = {
        f"frozen/{path}/width": (jnp.asarray(width, jnp.int32), None) for path, width in widths.items()
    }
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables))
    return rebuild(dict(variables), shapes, given)


def sliced(model: nn.Module, variables: Variables, *example: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The same function, to rounding, without the components that do not act.

    An ordered site becomes `low_rank(rank=width)`, or `dense()` where the factors would hold no fewer numbers; all other
    leaves keep their bits. The arrays are for one device.

    Args:
      model: with all structures assigned, as by `structmat.nn.assign`. variables: its `params` and `frozen`.
      example: of a call, as for `structmat.nn.sites`.

    Returns:
      The model and its variables.

    Raises:
      StructureError: the model has no ordered site.
    """
    table = sites(model, *example)
    chosen: dict[str, Structure] = {}
    given: dict[str, Piece] = {}
    for path, site in _ordered(table).items():
        held, bound = site_params(variables, path, site), site.bound
        width = int(held["width"])
        a, b = held["a"][:width], held["b"][:width]
        if bound.params_at(width) < bound.d_in * bound.d_out:
            chosen[path] = LowRank(rank=width, init=bound.structure.init)
            given |= {f"params/{path}/a": (a, None), f"params/{path}/b": (b, None)}
        else:
            chosen[path] = Dense(init=bound.structure.init)
            given[f"params/{path}/kernel"] = (jnp.matmul(a.T, b, precision="highest"), None)
    new = reassign(model, chosen, *example)
    template = nn.meta.unbox(jax.eval_shape(new.init, jax.random.key(0), *example))
    return new, rebuild(dict(variables), template, given)


def _ordered(table: Mapping[str, Site]) -> dict[str, Site]:
    found = {path: site for path, site in table.items() if isinstance(site.bound, BoundOrdered)}
    if not found:
        there = dict.fromkeys(site.bound.structure.short() for site in table.values())
        raise StructureError(f"the model has no site that is ordered(); its structures: {', '.join(there)}")
    return found
