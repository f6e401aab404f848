"""Rules: what happens to parameters, masks or optimiser state after the optimiser, inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from structmat.nn import PROBE, Site, leaf_groups
from structmat.nn.sites import array_path
from structmat.training.state import TrainState

DenseGradients = dict[str, jax.Array]
"""Array path of a site (`layers_0to3/mlp/up`) -> gradient by its dense matrix, (d_in, d_out) or (layers, d_in, d_out)."""


class Rule(Protocol):
    """A pure update of the whole state; `repr` of it is part of a run's identity, so make it a frozen dataclass.

    `needs_dense_gradients` asks for a second evaluation of the loss, only on the steps that are `due`: True for the
    gradients of all sites, or the array paths of those wanted, which saves the others' memory.
    """

    needs_dense_gradients: bool | tuple[str, ...]

    def init(self, sites: Mapping[str, Site], state: TrainState) -> Any:
        """Arrays the rule keeps: saved, restored, sharded and donated with the state; traceable."""

    def due(self, step: jax.Array) -> jax.Array:
        """Whether the rule acts after the optimiser's update number `step` (int32, from 1), as a bool array."""

    def update(self, key: jax.Array, step: jax.Array, dense_grads: DenseGradients, state: TrainState) -> TrainState:
        """The state after the rule: same paths, shapes and dtypes. `dense_grads` is empty unless asked for."""


def dense_gradients(
    loss: Callable[[Mapping[str, Any]], jax.Array], variables: Mapping[str, Any], sites: Mapping[str, Site]
) -> DenseGradients:
    """Gradient of the loss by the materialised matrix of every site.

    A zero matrix is added to each site's product (collection `probe`); its gradient is the one asked for, whatever the
    structure, and no matrix is formed but the gradient itself.

    Args:
      loss: variables -> scalar.
      variables: collections of the model, `params` and `frozen`.
      sites: of the model.

    Returns:
      array path -> (d_in, d_out) f32, with a leading axis over the layers of a scanned group.
    """
    probe: dict[str, Any] = {}
    for place, (_, site) in leaf_groups(sites).items():
        stack = (site.stack.size,) if site.stack else ()
        node = probe
        for part in place:
            node = node.setdefault(part, {})
        node["weight"] = jnp.zeros((*stack, site.bound.d_in, site.bound.d_out), jnp.float32)
    grads = jax.grad(lambda p: loss({**variables, PROBE: p}))(probe)
    out = {}
    for place in leaf_groups(sites):
        node = grads
        for part in place:
            node = node[part]
        out["/".join(place)] = node["weight"]
    return out


def wanted_sites(rule: Rule, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites whose dense gradients a rule asks for."""
    asked = rule.needs_dense_gradients
    if isinstance(asked, bool):
        return dict(sites) if asked else {}
    return {path: site for path, site in sites.items() if "/".join(array_path(path, site)) in asked}


def dense_gradient_of(path: str, site: Site, dense_grads: DenseGradients) -> jax.Array:
    """(d_in, d_out): the gradient of one layer's site."""
    whole = dense_grads["/".join(array_path(path, site))]
    return whole if site.stack is None else whole[site.stack.index]
