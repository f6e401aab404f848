"""SST: all singular values train at every step, the vectors of a few triplets at a time, drawn by singular value.

Zhao et al., ICML 2025, arXiv 2405.15481, on sites `sst(rank=r)`, which hold W = U diag(s) V^T of full rank m. The first
set is drawn after the first step, and another every `every` steps; a round is the ceil(m / r) of them that could cover the
spectrum, and at its end U, s and V become the SVD of the matrix they make, which stays as it is. The paper's lengths of
both, and of the warm-up, are not known to us: they are our choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from structmat.nn import Site
from structmat.nn.method import Method
from structmat.sparse.masks import get, map_mirrors, put
from structmat.sparse.places import Place, none_of, places
from structmat.sparse.warm_up import begin_again, warm_up
from structmat.structures import StructureError
from structmat.structures.leaf import Params
from structmat.structures.linalg import truncated_svd
from structmat.structures.sst import BoundSst

Sampling = Literal["mixed", "uniform", "top", "sequential"]


@dataclasses.dataclass(frozen=True, repr=False)
class Sst(Method):
    """`sst(every=200, warmup=20, sampling='mixed', renew=True)`.

    Triplets are drawn without replacement with p(i) = 1/2 (1/m + s_i / sum s); `sampling` may be `uniform`, `top` (the
    largest s) or `sequential` (the next r) instead. The updates of vectors that were just drawn grow from 0 to their size
    over `warmup` steps. `renew=False` leaves out the SVDs.
    """

    every: int = 200
    warmup: int = 20
    sampling: Sampling = "mixed"
    renew: bool = True
    name: ClassVar[str] = "sst"

    def check(self) -> None:
        self.need(every=1, warmup=0)
        if self.warmup >= self.every:
            raise StructureError(
                f"sst: warmup={self.warmup} must be below every={self.every}, or vectors never move at their full rate; "
                f"{self.every // 10} is"
            )

    def rule(self, sites: Mapping[str, Site], steps: int) -> TurnTriplets:
        if self.every >= steps:
            raise StructureError(
                f"sst: every={self.every} of {steps} steps draws triplets once only; every must be below the steps, such "
                f"as {max(1, steps // 10)}"
            )
        return TurnTriplets(find_spectra(sites), self.every, self.sampling, self.renew)

    def link(self, sites: Mapping[str, Site], steps: int) -> optax.GradientTransformation | None:
        if not self.warmup:
            return None
        return warm_up([place.text(side) for place in find_spectra(sites) for side in "uv"], self.warmup)


def find_spectra(sites: Mapping[str, Site]) -> tuple[Place, ...]:
    """Every structure `sst` of a model, whole or a term of a sum.

    Raises:
      StructureError: there are none, or one of which s, u and v do not all train.
    """
    found = []
    for path, place in places(sites).items():
        own = [term for term in place.terms() if isinstance(term.bound, BoundSst)]
        for term in own:
            if frozen := [name for name in "suv" if not term.bound.leaves()[name].trainable]:
                raise StructureError(
                    f"sst: site {path} is {term.bound.structure.short()}, of which {', '.join(frozen)} must train too; "
                    "leave out train=..."
                )
        found += own
    if not found:
        what = "sst trains matrices kept as singular triplets, such as structure='sst(rank=16)'"
        raise none_of(sites, f"{what}, and this model has none")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class TurnTriplets:
    """The Rule of SST: needs no state of its own, for the order of the leaves says which triplets train.

    Attributes:
      spectra: which. every, sampling, renew: as in the method.
    """

    spectra: tuple[Place, ...]
    every: int
    sampling: Sampling
    renew: bool
    needs_dense_gradients: ClassVar[tuple[str, ...]] = ()

    def init(self, sites: Mapping[str, Site], state: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """On every step, for s and the lengths of the vectors."""
        return step > 0

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Mapping[str, jax.Array], state: Any) -> Any:
        """s not negative and vectors of unit length; at the end of an iteration other triplets to train."""
        params = state.params
        for place in self.spectra:
            params = put(params, place.path("s"), jnp.maximum(get(params, place.path("s")), 0))
            for side in "uv":
                params = put(params, place.path(side), unit(get(params, place.path(side))))
        state = state.replace(params=params)
        iteration, into = (step - 1) // self.every, (step - 1) % self.every
        return jax.lax.cond(into == 0, lambda now: self._next(key, iteration, now), lambda now: now, state)

    def _next(self, key: jax.Array, iteration: jax.Array, state: Any) -> Any:
        """The state at the beginning of an iteration; the first is number 0."""
        params, frozen, moments = state.params, state.frozen, {}
        for place in self.spectra:
            bound = place.bound
            begins = iteration % math.ceil(bound.full / bound.structure.rank) == 0
            again = begins & (iteration > 0) & self.renew
            one = lambda k, held, bound=bound, again=again: turn(bound, k, held, self.sampling, again, iteration == 0)
            trees = {name: params if leaf.trainable else frozen for name, leaf in bound.leaves().items()}
            held = {name: get(tree, place.path(name)) for name, tree in trees.items()}
            held, order = (jax.vmap(one) if place.stacked else one)(place.keys(key), held)
            for name, leaf in bound.leaves().items():
                if leaf.trainable:
                    params = put(params, place.path(name), held[name])
                else:
                    frozen = put(frozen, place.path(name), held[name])
            follow = lambda m, again=again, order=order: jnp.where(again, 0, jnp.take_along_axis(m, order, axis=-1))
            moments |= {place.text("u"): jnp.zeros_like, place.text("v"): jnp.zeros_like, place.text("s"): follow}
        carry = lambda path, leaf: moments[path](leaf) if path in moments else leaf
        opt_state = begin_again(map_mirrors(carry, params, state.opt_state))
        return state.replace(params=params, frozen=frozen, opt_state=opt_state)


def turn(
    bound: BoundSst, key: jax.Array, held: Params, sampling: Sampling, again: jax.Array, first: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """The leaves of one layer with other triplets to train, and the order (m,) int32 of the ones before in it.

    Args:
      again: bool (), whether the SVD is taken before. first: bool (), whether it was just taken.
    """
    triplets = bound.join(held)
    u, s, v = jax.lax.cond(again, decomposed, lambda *same: same, *triplets)
    order = next_order(key, s, bound.structure.rank, sampling, again | first)
    return bound.split(u[order], s[order], v[order]), order


def decomposed(u: jax.Array, s: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The SVD of the matrix that the triplets u (m, d_in), s (m,), v (m, d_out) make, in the same form and dtypes."""
    wide = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
    left, values, right = truncated_svd((wide(u).T * wide(s)) @ wide(v), s.size)
    return left.T.astype(u.dtype), values.astype(s.dtype), right.astype(v.dtype)


def next_order(key: jax.Array, s: jax.Array, rank: int, sampling: Sampling, sorted_now: jax.Array) -> jax.Array:
    """int32 (m,): the triplets in their next order, of which the first `rank` train.

    Args:
      s: (m,), not negative. sorted_now: bool (), whether they are in the order of an SVD, where `sequential` begins.
    """
    m = s.size
    if sampling == "sequential":
        return (jnp.arange(m, dtype=jnp.int32) + jnp.where(sorted_now, 0, rank)) % m
    score = s if sampling == "top" else jax.random.gumbel(key, (m,))
    if sampling == "mixed":
        total = jnp.sum(s)
        share = jnp.where(total > 0, s / jnp.where(total > 0, total, 1), 1 / m)
        score = score + jnp.log(0.5 / m + 0.5 * share)
    return jnp.argsort(-score).astype(jnp.int32)


def unit(rows: jax.Array) -> jax.Array:
    """(..., d) with rows of unit length; those of zeros stay."""
    size = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.where(size > 0, size, 1)
