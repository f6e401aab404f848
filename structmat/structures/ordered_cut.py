"""Which components of ordered sites go first where a whole model has to fit into a budget."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.errors import StructureError
from structmat.structures.ordered import BoundOrdered


def cut_widths(
    bounds: Sequence[BoundOrdered], widths: jax.Array, importances: Sequence[jax.Array], budget: int
) -> jax.Array:
    """Widths with the least important components of all sites together cut away, until the sites fit into a budget.

    Every site keeps one component; one whose factors would hold no fewer numbers than its dense matrix keeps its width,
    for that costs nothing.

    Args:
      bounds: of the sites. widths: int32 (sites,). importances: of each site, (rank,). budget: stored numbers.

    Returns:
      int32 (sites,), none larger than before.

    Raises:
      StructureError: one component per site is too much.
    """
    if (least := sum(bound.params_at(1) for bound in bounds)) > budget:
        raise StructureError(f"one component of every site takes {least} numbers, more than {budget}")
    costs = [np.diff([bound.params_at(k) for k in range(bound.structure.rank + 1)]) for bound in bounds]
    unit = int(np.gcd.reduce(np.concatenate(costs)))
    whole = sum(int(cost.sum()) for cost in costs) // unit
    if whole >= 2**31:
        raise StructureError(f"cut: {whole} units of {unit} numbers are more than can be counted; at most {2**31 - 1}")
    ranks = [bound.structure.rank for bound in bounds]
    site, number = np.repeat(np.arange(len(ranks)), ranks), np.concatenate([np.arange(r) for r in ranks])
    cost = jnp.asarray(np.concatenate(costs) // unit, jnp.int32)
    there = number < widths[site]
    cost_there, removable = jnp.where(there, cost, 0), there & (number > 0)
    order = jnp.lexsort((-number, jnp.where(removable, jnp.concatenate(importances), jnp.inf)))
    saved = jnp.cumsum(jnp.where(removable, cost_there, 0)[order])
    before = jnp.sum(cost_there) - saved + jnp.where(removable, cost_there, 0)[order]
    gone = removable[order] & (before > budget // unit)
    left = widths - jnp.zeros_like(widths).at[jnp.asarray(site)[order]].add(gone.astype(widths.dtype))
    sizes = np.array([-(-bound.d_in * bound.d_out // (bound.d_in + bound.d_out)) for bound in bounds])
    return jnp.where(left >= sizes, widths, left)
