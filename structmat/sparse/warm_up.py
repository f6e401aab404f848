"""The learning rate of parameters that a method has just replaced: up from 0 again, while the others keep theirs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class WarmUp(NamedTuple):
    """`since`: int32 (), updates since the parameters were last replaced."""

    since: jax.Array


def warm_up(paths: Collection[str], steps: int) -> optax.GradientTransformation:
    """Updates of the parameters at these slash paths times min(1, since / steps); `begin_again` sets `since` to 0."""
    replaced = set(paths)

    def update(updates: Any, state: WarmUp, params: Any = None) -> tuple[Any, WarmUp]:
        factor = jnp.minimum(1.0, state.since.astype(jnp.float32) / steps)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        scaled = lambda path, u: u * factor.astype(u.real.dtype) if name(path) in replaced else u
        return jax.tree_util.tree_map_with_path(scaled, updates), WarmUp(state.since + 1)

    return optax.GradientTransformation(lambda params: WarmUp(jnp.zeros((), jnp.int32)), update)


def begin_again(opt_state: Any) -> Any:
    """The optimiser's state with every `WarmUp` at its start."""
    is_one = lambda node: isinstance(node, WarmUp)
    fresh = lambda node: WarmUp(jnp.zeros_like(node.since)) if is_one(node) else node
    return jax.tree.map(fresh, opt_state, is_leaf=is_one)
