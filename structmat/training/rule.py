"""Rules: what happens to parameters, masks or optimiser state after the optimiser, inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from structmat.nn import PROBE, Site, leaf_groups
from structmat.nn.sites import array_path
from structmat.sparse.masks import get, put
from structmat.training.state import TrainState

DenseGradients = dict[str, jax.Array]
"""Array path of a site (`layers_0to3/mlp/up`) -> gradient by its dense matrix, (d_in, d_out) or (layers, d_in, d_out)."""


class Rule(Protocol):
    """A pure update of the whole state; `repr` of it is part of a run's identity, so make it a frozen dataclass.

    `needs_dense_gradients` asks for a second evaluation of the loss, only on the steps that are `due`: True for the
    gradients of all sites, or the array paths of those wanted, which saves the others' memory. A path into a site
    (`layers_0/1`) is that of a masked dense weight there, and asks for the gradient by it as if nothing were masked.
    """

    needs_dense_gradients: bool | tuple[str, ...]

    def init(self, sites: Mapping[str, Site], state: TrainState) -> Any:
        """Arrays the rule keeps: saved, restored, sharded and donated with the state; traceable."""

    def due(self, step: jax.Array) -> jax.Array:
        """Whether the rule acts after the optimiser's update number `step` (int32, from 1), as a bool array."""

    def update(self, key: jax.Array, step: jax.Array, dense_grads: DenseGradients, state: TrainState) -> TrainState:
        """The state after the rule: same paths, shapes and dtypes. `dense_grads` is empty unless asked for."""


def dense_gradients(
    loss: Callable[[Mapping[str, Any]], jax.Array],
    variables: Mapping[str, Any],
    sites: Mapping[str, Site],
    masked: Sequence[str] = (),
) -> DenseGradients:
    """Gradient of the loss by the materialised matrix of every site.

    A zero matrix is added to each site's product (collection `probe`); its gradient is the one asked for, whatever the
    structure, and no matrix is formed but the gradient itself.

    Args:
      loss: variables -> scalar.
      variables: collections of the model, `params` and `frozen`.
      sites: of the model.
      masked: paths of masked dense weights within sites.

    Returns:
      array path -> (d_in, d_out) f32, with a leading axis over the layers of a scanned group; so for `masked`. Of a complex
      matrix complex64, d/dRe + i d/dIm: what the step descends against.
    """
    probe: dict[str, Any] = {}
    for place, (_, site) in leaf_groups(sites).items():
        stack = (site.stack.size,) if site.stack else ()
        node = probe
        for part in place:
            node = node.setdefault(part, {})
        dtype = jnp.complex64 if site.bound.is_complex else jnp.float32
        node["weight"] = jnp.zeros((*stack, site.bound.d_in, site.bound.d_out), dtype)
    places = {path: tuple(path.split("/")) for path in masked}
    params, frozen, kernels = variables["params"], variables.get("frozen", {}), {}
    for path, place in places.items():
        mask = get(frozen, (*place, "mask"))
        kernels[path] = jnp.where(mask, get(params, (*place, "weights", "kernel")), 0)
        frozen = put(frozen, (*place, "mask"), jnp.ones_like(mask))

    def of(probe: Any, kernels: Mapping[str, jax.Array]) -> jax.Array:
        own = params
        for path, place in places.items():
            own = put(own, (*place, "weights", "kernel"), kernels[path])
        return loss({**variables, "params": own, "frozen": frozen, PROBE: probe})

    grads, out = jax.grad(of, argnums=(0, 1))(probe, kernels)
    for place in leaf_groups(sites):
        node = grads
        for part in place:
            node = node[part]
        out["/".join(place)] = jnp.conj(node["weight"])  # of a real one itself
    return out


def wanted_sites(rule: Rule, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites whose dense gradients a rule asks for."""
    asked = rule.needs_dense_gradients
    if isinstance(asked, bool):
        return dict(sites) if asked else {}
    return {path: site for path, site in sites.items() if "/".join(array_path(path, site)) in asked}


def wanted_parts(rule: Rule, sites: Mapping[str, Site]) -> tuple[str, ...]:
    """The paths into sites that a rule asks for."""
    asked, known = rule.needs_dense_gradients, {"/".join(array_path(path, site)) for path, site in sites.items()}
    return () if isinstance(asked, bool) else tuple(path for path in asked if path not in known)


def dense_gradient_of(path: str, site: Site, dense_grads: DenseGradients) -> jax.Array:
    """(d_in, d_out): the gradient of one layer's site."""
    whole = dense_grads["/".join(array_path(path, site))]
    return whole if site.stack is None else whole[site.stack.index]
