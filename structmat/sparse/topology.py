"""SET and RigL: the support of a masked weight moves while it trains, its size stays.

SET: Mocanu et al., Nature Communications 2018. RigL: Evci et al., ICML 2020, arXiv 1911.11134. Every `every` steps the
fraction f(t) = drop/2 (1 + cos(pi t / T)) of the support with the smallest |w| is dropped, and as many entries outside
what is kept are grown: at random (SET), or where the gradient by the dense matrix is largest (RigL). T is `until` of
the run, and from there on the support stays. An entry dropped and grown at once stays as it was.

As in the paper's code, grown weights start at 0, so that the function changes by the dropped weights alone, and the
optimiser's moments there at 0; unlike there the optimiser's own update is taken on these steps too, before the move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from structmat.nn import Site
from structmat.nn.method import Method
from structmat.sparse.masks import Mask, find_masks, get, map_mirrors, put
from structmat.structures import StructureError
from structmat.structures.selection import largest


@dataclasses.dataclass(frozen=True, repr=False)
class _Topology(Method):
    """The arguments SET and RigL share."""

    every: int = 100
    drop: float = 0.3
    until: float = 0.8
    grow: ClassVar[Literal["random", "gradient"]]

    def check(self) -> None:
        self.need(every=1)
        for field in ("drop", "until"):
            if not 0 < (value := getattr(self, field)) <= 1:
                raise StructureError(f"{self.name}: {field} must be in (0, 1], got {value}")

    def rule(self, sites: Mapping[str, Site], steps: int) -> MoveSupport:
        stop = round(self.until * steps)
        if self.every >= stop:
            best = f"every must be below until * steps = {stop}, such as {max(1, stop // 10)}"
            raise StructureError(
                f"{self.name}: every={self.every} with until={self.until} of {steps} steps never moves a support; "
                + (best if stop > 1 else "train for longer, or raise until")
            )
        return MoveSupport(find_masks(sites, self.name), self.every, self.drop, stop, self.grow)


@dataclasses.dataclass(frozen=True, repr=False)
class Set(_Topology):
    """`set(every=100, drop=0.3, until=0.8)`: regrow at random."""

    name: ClassVar[str] = "set"
    grow: ClassVar[Literal["random", "gradient"]] = "random"


@dataclasses.dataclass(frozen=True, repr=False)
class RigL(_Topology):
    """`rigl(every=100, drop=0.3, until=0.8)`: regrow where the gradient is largest."""

    name: ClassVar[str] = "rigl"
    grow: ClassVar[Literal["random", "gradient"]] = "gradient"


@dataclasses.dataclass(frozen=True)
class MoveSupport:
    """The Rule of both: needs no state of its own, for the masks are frozen leaves of the model.

    Attributes:
      masks: which. every, drop: as in the methods. stop: the step from which nothing moves. grow: where.
    """

    masks: tuple[Mask, ...]
    every: int
    drop: float
    stop: int
    grow: Literal["random", "gradient"]

    @property
    def needs_dense_gradients(self) -> tuple[str, ...]:
        """Those of the masked sites, or of the masked weights themselves, to grow by them."""
        return tuple(mask.gradient for mask in self.masks) if self.grow == "gradient" else ()

    def init(self, sites: Mapping[str, Site], state: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """Every `every` steps before `stop`."""
        return (step % self.every == 0) & (step < self.stop)

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Mapping[str, jax.Array], state: Any) -> Any:
        """Masks moved; weights and moments outside the part of the support that stayed are zero."""
        params, frozen, stayed = state.params, state.frozen, {}
        fraction = cosine_drop(step, self.drop, self.stop)
        for i, mask in enumerate(self.masks):
            w, old = get(params, mask.weight), get(frozen, mask.mask)
            own = jax.random.fold_in(key, self._number(i))
            keys = jax.vmap(lambda n, own=own: jax.random.fold_in(own, n))(jnp.array(mask.layers))
            if self.grow == "gradient":
                score = jnp.abs(dense_grads[mask.gradient])
            else:
                draw = lambda k, shape=w.shape[-2:]: jax.random.uniform(k, shape)
                score = jax.vmap(draw)(keys) if mask.stacked else draw(keys[0])
            one = lambda w, m, s, count=mask.count: move(w, m, s, jnp.floor(fraction * count).astype(jnp.int32), count)
            new = (jax.vmap(one) if mask.stacked else one)(w, old, score)
            stayed["/".join(mask.weight)] = old & new
            params = put(params, mask.weight, jnp.where(old & new, w, 0))
            frozen = put(frozen, mask.mask, new)
        clear = lambda path, leaf: jnp.where(stayed[path], leaf, 0) if path in stayed else leaf
        opt_state = map_mirrors(clear, params, state.opt_state)
        return state.replace(params=params, frozen=frozen, opt_state=opt_state)

    def _number(self, index: int) -> int:
        """Of a mask among those of its site."""
        place = self.masks[index].place
        return sum(mask.place == place for mask in self.masks[:index])


def cosine_drop(step: jax.Array, drop: float, stop: int) -> jax.Array:
    """f32 (): the fraction dropped at `step`, from `drop` at 0 to nothing at `stop`."""
    return drop / 2 * (1 + jnp.cos(math.pi * step.astype(jnp.float32) / stop))


def move(w: jax.Array, mask: jax.Array, score: jax.Array, drop: jax.Array, count: int) -> jax.Array:
    """The next support of one weight: without the `drop` smallest |w|, with the `drop` best scores outside what is kept.

    Args:
      w: (d_in, d_out). mask: bool, `count` entries. score: not negative. drop: int32 (), at most `count`.

    Returns:
      bool (d_in, d_out) of `count` entries; ties go to the lower position. The dropped entries may be grown again.
    """
    kept = largest(jnp.abs(w), mask, count - drop)
    return kept | largest(score, ~kept, drop)
