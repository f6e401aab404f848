"""ReLoRA: a low-rank term that is merged into the frozen matrix beside it and begun anew, so that the rank of what was
learned grows.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695; as SST's baseline of
that name, without a phase of dense training and with moments set to zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from structmat.nn import Site
from structmat.nn.method import Method
from structmat.sparse.masks import get, map_mirrors, put
from structmat.sparse.places import Place, none_of, places
from structmat.sparse.warm_up import begin_again, warm_up
from structmat.structures import StructureError
from structmat.structures.algebra import trains
from structmat.structures.dense import BoundDense
from structmat.structures.low_rank import BoundLowRank
from structmat.structures.wrappers import BoundFrozen

EXAMPLE = "frozen(dense()) + low_rank(rank=16)"


@dataclasses.dataclass(frozen=True, repr=False)
class ReLoRA(Method):
    """`relora(every=200, warmup=20)` on sites `frozen(dense()) + low_rank(rank=r)`.

    Every `every` steps a^T b is added to the frozen matrix, a is drawn as at initialisation and b is zero; the updates of
    both then grow from 0 to their size over `warmup` steps.
    """

    every: int = 200
    warmup: int = 20
    name: ClassVar[str] = "relora"

    def check(self) -> None:
        self.need(every=1, warmup=0)
        if self.warmup >= self.every:
            raise StructureError(
                f"relora: warmup={self.warmup} must be below every={self.every}, or factors never move at their full "
                f"rate; {self.every // 10} is"
            )

    def rule(self, sites: Mapping[str, Site], steps: int) -> Merge:
        if self.every >= steps:
            raise StructureError(
                f"relora: every={self.every} of {steps} steps never merges; every must be below the steps, such as "
                f"{max(1, steps // 10)}"
            )
        return Merge(find_adapters(sites), self.every)

    def link(self, sites: Mapping[str, Site], steps: int) -> optax.GradientTransformation | None:
        if not self.warmup:
            return None
        return warm_up([low.text(name) for _, low in find_adapters(sites) for name in "ab"], self.warmup)


def find_adapters(sites: Mapping[str, Site]) -> tuple[tuple[Place, Place], ...]:
    """(frozen dense term, low-rank term) of every sum that has one of each.

    Raises:
      StructureError: there are none.
    """
    found = []
    for place in places(sites).values():
        terms = list(place.terms())
        still = [t for t in terms if isinstance(t.bound, BoundFrozen) and isinstance(t.bound.inner, BoundDense)]
        low = [t for t in terms if isinstance(t.bound, BoundLowRank) and trains(t.bound)]
        if len(still) == len(low) == 1:
            found.append((still[0], low[0]))
    if not found:
        what = f"relora merges a low-rank term into a frozen dense one, as in structure={EXAMPLE!r}"
        raise none_of(sites, f"{what}, and this model has no such sum of one of each")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Merge:
    """The Rule of ReLoRA; needs no state of its own.

    Attributes:
      adapters: (frozen term, low-rank term) of each. every: as in the method.
    """

    adapters: tuple[tuple[Place, Place], ...]
    every: int
    needs_dense_gradients: ClassVar[tuple[str, ...]] = ()

    def init(self, sites: Mapping[str, Site], state: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """Every `every` steps."""
        return step % self.every == 0

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Mapping[str, jax.Array], state: Any) -> Any:
        """Low-rank terms merged and begun anew; the function stays, up to rounding."""
        params, frozen, begun = state.params, state.frozen, set()
        for still, low in self.adapters:
            a, b = (get(params, low.path(name)) for name in "ab")
            w = get(frozen, still.path("kernel"))
            frozen = put(frozen, still.path("kernel"), w + (jnp.swapaxes(a, -1, -2) @ b).astype(w.dtype))
            draw = lambda k, low=low, a=a: low.bound.init(k, a.dtype, gain=0.0)["a"]
            fresh = (jax.vmap(draw) if low.stacked else draw)(low.keys(key))
            params = put(put(params, low.path("a"), fresh), low.path("b"), jnp.zeros_like(b))
            begun |= {low.text("a"), low.text("b")}
        clear = lambda path, leaf: jnp.zeros_like(leaf) if path in begun else leaf
        opt_state = begin_again(map_mirrors(clear, params, state.opt_state))
        return state.replace(params=params, frozen=frozen, opt_state=opt_state)
