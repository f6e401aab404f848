"""Where a model keeps the masks a method may move, and all that mirrors the weights under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from structmat.nn import Site
from structmat.sparse.places import none_of, places
from structmat.structures import Bound, StructureError
from structmat.structures.dense import BoundDense
from structmat.structures.masked import BoundMasked
from structmat.structures.unstructured import EXAMPLE, BoundUnstructured

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Mask:
    """The arrays of one mask; those of a scanned group have a leading axis over its layers.

    Attributes:
      place: path of the site's arrays in the variables.
      inner: path from there to the masked term: () for the whole weight, ("1",) in a sum.
      count: entries of the support, of each layer.
      layers: number of each layer among all sites of the model, so that draws do not depend on how layers are stacked.
      stacked: whether the leading axis is there.
      apart: whether a nonlinearity lies between it and its site's input or output.
    """

    place: tuple[str, ...]
    inner: tuple[str, ...]
    count: int
    layers: tuple[int, ...]
    stacked: bool
    apart: bool = False

    @property
    def gradient(self) -> str:
        """Whose dense gradient is that by this weight unmasked: the site's, or its own."""
        return "/".join((*self.place, *self.inner) if self.apart else self.place)

    @property
    def weight(self) -> tuple[str, ...]:
        """Path of the weights among the parameters."""
        return (*self.place, *self.inner, "weights", "kernel")

    @property
    def mask(self) -> tuple[str, ...]:
        """Path of the mask among the frozen leaves."""
        return (*self.place, *self.inner, "mask")


def find_masks(sites: Mapping[str, Site], name: str) -> tuple[Mask, ...]:
    """The masks of a model that the method `name` moves: of dense weights, whole or as parts of sums, bottlenecks and parallel
    branches.

    Raises:
      StructureError: there are none, or one whose rule keeps masked weights alive.
    """
    found = []
    for path, place in places(sites).items():
        for term, apart in place.parts():
            bound = term.bound
            if not _movable(bound):
                continue
            if bound.structure.rule != "plain":
                raise StructureError(
                    f"{name}: site {path} is {bound.structure.short()}, whose masked weights go on training; "
                    f"rule='plain' stops them, as in {EXAMPLE}"
                )
            found.append(Mask(term.site, term.inner, bound.pattern.count, term.layers, term.stacked, apart))
    if not found:
        what = f"{name} moves the support of masked dense weights, such as structure={EXAMPLE!r}"
        raise none_of(sites, f"{what}, and this model has none")
    return tuple(found)


def _movable(bound: Bound) -> bool:
    return (
        isinstance(bound, BoundMasked)
        and isinstance(bound.pattern, BoundUnstructured)
        and isinstance(bound.inner, BoundDense)
        and bound.inner.leaves()["kernel"].trainable
    )


def get(tree: Tree, path: tuple[str, ...]) -> Any:
    """The leaf at a path."""
    for part in path:
        tree = tree[part]
    return tree


def put(tree: Tree, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The tree with another leaf at a path."""
    head, *rest = path
    return {**tree, head: put(tree[head], tuple(rest), value) if rest else value}


def map_mirrors(fn: Callable[[str, jax.Array], jax.Array], params: Tree, state: Any) -> Any:
    """Apply `fn(path of the parameter, leaf)` to every leaf of an optimiser's state that mirrors a parameter.

    Those are the leaves whose path ends in the parameter's and whose shape is the parameter's, as the moments of optax
    are, however they are nested; counts and factored moments stay as they are.
    """
    text = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    shapes = {text(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        parts = text(path).split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((end for end in ends if end in shapes), None)
        return leaf if name is None or shapes[name] != leaf.shape else fn(name, leaf)

    return jax.tree_util.tree_map_with_path(one, state)
