"""Structure-aware learning rates: a rate tuned for a dense model carries over to any structure and width.

Every factor of a structured weight is treated as a dense map of its own fan-in (Qiu et al. 2024, "Compute Better
Spent"): with Adam, its learning rate is multiplied by

    kappa = d_in(base) / (fan_in * share)

where d_in(base) is the input size of the same site in the model the rate was tuned on, and share counts the trainable
factors in the chain times the trainable terms in the sum. For a dense weight this is muP's d_base / d. Parameters that
are not part of a site (biases, norms, positions) keep the plain rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from structmat.nn.sites import Site, leaf_groups
from structmat.structures import Leaf, StructureError
from structmat.structures.leaf import Leaves


def leaf_multiplier(leaf: Leaf, kind: str, base_d_in: int) -> float:
    """kappa of one leaf; 1 for learned scalars and norms. Embeddings read one-hot inputs: their input size is 1.

    Examples:
      >>> from structmat.structures import parse
      >>> leaves = parse("low_rank(rank=8)").bind(512, 512).leaves()
      >>> {name: leaf_multiplier(leaf, "linear", base_d_in=128) for name, leaf in leaves.items()}
      {'a': 0.125, 'b': 8.0}
    """
    if leaf.fixed_rate:
        return 1.0
    if kind == "embed":
        return 1 / (leaf.embed_fan * leaf.share)
    return base_d_in / (leaf.fan_in * leaf.share)


def multipliers(table: Mapping[str, Site], base: Mapping[str, Site], params: Any) -> Any:
    """A tree of floats like `params`, from shapes alone.

    Args:
      table: sites of the model trained. base: sites of the model the learning rate was tuned on; only their input
        sizes matter, so a dense model of the base width will do.
      params: the trainable tree (arrays or ShapeDtypeStructs, unboxed).

    Raises:
      StructureError: a site has no counterpart in the base model.
    """
    out = jax.tree.map(lambda _: 1.0, params)
    for place, (path, site) in leaf_groups(table).items():
        if path not in base:
            raise StructureError(f"site {path} is not in the base model of mup; base sites: {', '.join(base)}")
        base_d_in = base[path].bound.d_in
        _fill(_node(out, place), site.bound.leaves(), lambda leaf: leaf_multiplier(leaf, site.kind, base_d_in))  # noqa: B023
    return out


def decay_mask(table: Mapping[str, Site], params: Any) -> Any:
    """A tree of bools like `params`: weight decay acts on matrices of sites, never on vectors, biases or norms."""
    out = jax.tree.map(lambda _: False, params)
    for place, (_, site) in leaf_groups(table).items():
        _fill(_node(out, place), site.bound.leaves(), lambda leaf: leaf.decay and len(leaf.shape) >= 2)
    return out


def _node(tree: Any, place: tuple[str, ...]) -> dict[str, Any]:
    for part in place:
        tree = tree.get(part, {})
    return tree


def _fill(node: dict[str, Any], leaves: Leaves, value: Any) -> None:
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            if leaf.trainable:
                node[name] = value(leaf)
        elif name in node:
            _fill(node[name], leaf, value)


def scale_by_tree(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by its own static factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
