"""Where a model keeps the arrays of its sites, layer by layer and term by term."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from structmat.nn import Site, leaf_groups
from structmat.structures import Bound, StructureError
from structmat.structures.algebra import BoundSum
from structmat.structures.bottleneck import BoundBottleneck
from structmat.structures.parallel_branches import BoundParallel


@dataclasses.dataclass(frozen=True)
class Place:
    """The arrays of one structure; those of a scanned group have a leading axis over its layers.

    Attributes:
      site: path of the site's arrays in the variables. inner: path from there: () for the whole, ("1",) for a term of a sum.
      bound: the structure with its sizes.
      layers: number of each layer among all sites of the model, so that draws do not depend on how layers are stacked.
      stacked: whether the leading axis is there.
    """

    site: tuple[str, ...]
    inner: tuple[str, ...]
    bound: Bound
    layers: tuple[int, ...]
    stacked: bool

    def path(self, *leaf: str) -> tuple[str, ...]:
        """Of a leaf, in its collection."""
        return (*self.site, *self.inner, *leaf)

    def text(self, *leaf: str) -> str:
        """The same with slashes."""
        return "/".join(self.path(*leaf))

    def keys(self, key: jax.Array) -> jax.Array:
        """A key for each layer, (layers,), or () where there is no leading axis."""
        for part in self.inner:
            key = jax.random.fold_in(key, int(part))
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.array(self.layers))
        return keys if self.stacked else keys[0]

    def terms(self) -> Iterator[Place]:
        """The terms of a sum, and of sums in it; itself if it is none."""
        if not isinstance(self.bound, BoundSum):
            yield self
            return
        for i, term in enumerate(self.bound.terms):
            yield from dataclasses.replace(self, inner=(*self.inner, str(i)), bound=term).terms()

    def parts(self, apart: bool = False) -> Iterator[tuple[Place, bool]]:
        """As `terms`, also within what puts nonlinearities between its parts; of each whether one follows it (or precedes
        it), so that its gradient is not the site's."""
        bound = self.bound
        if isinstance(bound, BoundBottleneck):
            inner = (bound.a, bound.b)
        elif isinstance(bound, BoundSum | BoundParallel):
            inner = bound.terms if isinstance(bound, BoundSum) else bound.branches.terms
        else:
            yield self, apart
            return
        apart = apart or not isinstance(bound, BoundSum)
        for i, part in enumerate(inner):
            yield from dataclasses.replace(self, inner=(*self.inner, str(i)), bound=part).parts(apart)


def places(sites: Mapping[str, Site]) -> dict[str, Place]:
    """Path of the first layer -> place, for each distinct place of arrays."""
    numbers, found = {path: i for i, path in enumerate(sites)}, {}
    for place, (path, site) in leaf_groups(sites).items():
        layers = tuple(numbers[p] for p, s in sites.items() if (s.stack.path if s.stack else p) == "/".join(place))
        found[path] = Place(place, (), site.bound, layers, site.stack is not None)
    return found


def none_of(sites: Mapping[str, Site], what: str) -> StructureError:
    """The error of a method `what` finds nothing for, with the structures there are."""
    there = dict.fromkeys(site.bound.structure.short() for site in sites.values())
    return StructureError(f"{what}; its structures: {', '.join(there)}")
