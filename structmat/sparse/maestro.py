"""Maestro: the rank of every layer is found while it trains, by ordered dropout and a hierarchical group lasso.

Horvath et al., ICML 2024, arXiv 2308.14929. On every step one layer is truncated to its first b components, so that the
first ones matter most; the lasso pulls what is not needed to zero, and components that have become unimportant are taken
away. For a linear map of isotropic inputs every truncation at once is the best approximation of its rank.

The loss is that of the truncated model alone, as in the scripts of the paper's code (`--no-full-pass`); with the full pass
it is that of the whole model, from whose softmax the truncated one learns beside it, at twice the computation. The order of
the steps is that of its `per_layer` sampler.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from structmat.nn import Site
from structmat.nn.method import Method, Penalty, View
from structmat.nn.sites import array_path
from structmat.sparse.masks import get, map_mirrors, put
from structmat.sparse.places import Place, none_of, places
from structmat.structures import StructureError
from structmat.structures.ordered import BoundOrdered, acting, importance, tail_norms
from structmat.structures.ordered_cut import cut_widths


@dataclasses.dataclass(frozen=True, repr=False)
class Maestro(Method):
    """`maestro(every=100, lasso=1e-6, threshold=1e-5, keep=None, seed=0, full_pass=False)`: for sites that are `ordered()`.

    Every `every` steps and after the last one the components whose importance is below `threshold` go; `lasso` is the
    factor of the penalty. With `keep`, after the last step the least important components of all layers go until the
    sites have at most this fraction of their dense parameters. `seed` draws the order of truncations. With `full_pass`, for
    tasks of logits, the loss is that of the whole model plus the cross-entropy of the truncated one with the whole one's
    softmax, from which no gradient passes; metrics have the latter as `viewed`.
    """

    every: int = 100
    lasso: float = 1e-6
    threshold: float = 1e-5
    keep: float | None = None
    seed: int = 0
    full_pass: bool = False
    name: ClassVar[str] = "maestro"

    def check(self) -> None:
        self.need(every=1, seed=0)
        for field in ("lasso", "threshold"):
            if not getattr(self, field) >= 0:
                raise StructureError(f"maestro: {field} must not be negative, got {getattr(self, field)}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise StructureError(f"maestro: keep must be in (0, 1], got {self.keep}")

    def rule(self, sites: Mapping[str, Site], steps: int) -> Shrink:
        groups = find_ordered(sites)
        budget = (
            None if self.keep is None else int(self.keep * sum(g.bound.d_in * g.bound.d_out for g in _each(groups)))
        )
        rule = Shrink(groups, self.every, self.threshold, steps, budget)
        if budget is not None:
            try:
                jax.eval_shape(rule.cut, *_shapes(groups))
            except StructureError as error:
                raise StructureError(f"maestro: keep={self.keep} does not fit: {error}") from None
        return rule

    def view(self, sites: Mapping[str, Site], steps: int) -> View:
        return functools.partial(truncated, find_ordered(sites), self.seed)

    def penalty(self, sites: Mapping[str, Site], steps: int) -> Penalty | None:
        groups = find_ordered(sites)
        return (lambda variables, step: self.lasso * hierarchical_lasso(groups, variables)) if self.lasso else None

    def report(self, sites: Mapping[str, Site], variables: Mapping[str, Any]) -> dict[str, Any]:
        """`ranks`: site -> width found; `params`: site -> numbers to store at it; their sum, and that of dense matrices."""
        found = {path: site for path, site in sites.items() if isinstance(site.bound, BoundOrdered)}
        ranks = {}
        for path, site in found.items():
            width = jax.device_get(get(variables["frozen"], (*array_path(path, site), "width")))
            ranks[path] = int(width if site.stack is None else width[site.stack.index])
        params = {path: found[path].bound.params_at(rank) for path, rank in ranks.items()}
        dense = sum(site.bound.d_in * site.bound.d_out for site in found.values())
        return {"ranks": ranks, "params": params, "site_params": sum(params.values()), "dense_site_params": dense}


def find_ordered(sites: Mapping[str, Site]) -> tuple[Place, ...]:
    """The ordered sites of a model.

    Raises:
      StructureError: there are none.
    """
    found = tuple(place for place in places(sites).values() if isinstance(place.bound, BoundOrdered))
    if not found:
        what = "maestro finds the ranks of sites that are structure='ordered()'"
        raise none_of(sites, f"{what}, and this model has none")
    return found


def truncated(groups: Sequence[Place], seed: int, frozen: Any, key: jax.Array, step: jax.Array) -> Any:
    """The frozen leaves with one layer truncated, drawn by `draw`; `key`, of this step alone, is not used."""
    widths = _widths(groups, frozen)
    layer, width = draw(seed, step, widths, [group.bound.structure.rank for group in _each(groups)])
    return _with_widths(groups, frozen, widths.at[layer].set(width))


def draw(seed: int, step: jax.Array, widths: jax.Array, ranks: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Which layer is truncated on a step, and to how many components.

    All pairs of a layer and a number from 1 to its width come once in a period of sum(widths) steps, in an order drawn
    from the seed and the number of the period; periods are counted from step 0 as if the widths had always been these.

    Args:
      step: int32 (), from 0. widths: int32 (layers,). ranks: the most each width can be.

    Returns:
      (layer, width), int32 ().
    """
    layer = jnp.asarray(np.repeat(np.arange(len(ranks)), ranks), jnp.int32)
    number = jnp.asarray(np.concatenate([np.arange(1, rank + 1) for rank in ranks]), jnp.int32)
    period, position = jnp.divmod(step, jnp.sum(widths))
    order = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), period), layer.shape)
    at = jnp.argsort(jnp.where(number <= widths[layer], order, jnp.inf))[position]
    return layer[at], number[at]


def hierarchical_lasso(groups: Sequence[Place], variables: Mapping[str, Any]) -> jax.Array:
    """f32 (): the sum over layers and components i of |a[i:]| + |b[i:]| in Frobenius norm."""
    leaves = [get(variables["params"], group.path(name)) for group in groups for name in ("a", "b")]
    return sum(jnp.sum(tail_norms(leaf)) for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Shrink:
    """The Rule: widths shrink, and never grow; what lies past them is zero, in the weights and the optimiser's moments.

    Attributes:
      groups: the sites. every, threshold: as in the method. last: the run's last step. budget: numbers left after it.
    """

    groups: tuple[Place, ...]
    every: int
    threshold: float
    last: int
    budget: int | None
    needs_dense_gradients: ClassVar[bool] = False

    def init(self, sites: Mapping[str, Site], state: Any) -> dict[str, Any]:
        """Nothing: the widths are frozen leaves of the model."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """Every `every` steps, and after the last one."""
        return (step % self.every == 0) | (step == self.last)

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Mapping[str, jax.Array], state: Any) -> Any:
        """Widths without the components below the threshold, and after the last step within the budget."""
        found = [importance(*(get(state.params, group.path(name)) for name in ("a", "b"))) for group in self.groups]
        kept = jnp.concatenate([jnp.sum(i >= self.threshold, axis=-1, dtype=jnp.int32).reshape(-1) for i in found])
        widths = jnp.clip(kept, 1, _widths(self.groups, state.frozen))
        if self.budget is not None:
            widths = jnp.where(step == self.last, self.cut(widths, found), widths)
        frozen, params, acts = _with_widths(self.groups, state.frozen, widths), state.params, {}
        for group in self.groups:
            mask = acting(get(frozen, group.path("width")), group.bound.structure.rank)[..., None]
            for name in ("a", "b"):
                acts[group.text(name)] = mask
                params = put(params, group.path(name), jnp.where(mask, get(params, group.path(name)), 0))
        clear = lambda path, leaf: jnp.where(acts[path], leaf, 0) if path in acts else leaf
        return state.replace(params=params, frozen=frozen, opt_state=map_mirrors(clear, params, state.opt_state))

    def cut(self, widths: jax.Array, importances: Sequence[jax.Array]) -> jax.Array:
        """`cut_widths` of all layers: int32 (layers,), and importances (rank,) or (layers, rank) by group."""
        rows = [row for found in importances for row in found.reshape(-1, found.shape[-1])]
        return cut_widths(_bounds(self.groups), widths, rows, self.budget)


def _each(groups: Sequence[Place]) -> list[Place]:
    """Every group as often as it has layers."""
    return [group for group in groups for _ in group.layers]


def _bounds(groups: Sequence[Place]) -> list[BoundOrdered]:
    return [group.bound for group in _each(groups)]


def _widths(groups: Sequence[Place], frozen: Any) -> jax.Array:
    """int32 (layers,): of all groups in turn."""
    return jnp.concatenate([get(frozen, group.path("width")).reshape(-1) for group in groups])


def _with_widths(groups: Sequence[Place], frozen: Any, widths: jax.Array) -> Any:
    start = 0
    for group in groups:
        own = widths[start : start + len(group.layers)]
        frozen = put(frozen, group.path("width"), own if group.stacked else own[0])
        start += len(own)
    return frozen


def _shapes(groups: Sequence[Place]) -> tuple[jax.ShapeDtypeStruct, list[jax.ShapeDtypeStruct]]:
    each = _each(groups)
    rows = [jax.ShapeDtypeStruct((group.bound.structure.rank,), jnp.float32) for group in each]
    return jax.ShapeDtypeStruct((len(each),), jnp.int32), rows
