"""Simulated sparsity: a dense weight of any structure, masked in every forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.dense import BoundDense
from structmat.structures.descent import keep_better
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.reparam import sr_ste, ste
from structmat.structures.wrappers import Wrapper


@dataclasses.dataclass(frozen=True, repr=False)
class Masked(Composite):
    """`masked(a, pattern)`: W = mask * A, simulated: stored and executed dense.

    The pattern is unstructured, n_m_sparse, random_sparse, block_sparse or channel_sparse. Where it goes by size
    (n_m_sparse, select='magnitude' or 'norm', pattern='magnitude') the mask follows the current A; a random support is
    drawn once and kept, but for `unstructured` and a method that moves it (structmat.sparse). Export to the real thing
    is `pattern.project(materialize)`.

    Rules, for the gradient that A gets from the gradient g at W: `plain` mask * g; `ste` g, so that masked entries
    stay alive; `sr_ste` g + decay (1 - mask) A (Zhou et al. 2021, arXiv 2102.04010).
    """

    a: Structure
    pattern: Structure
    rule: Literal["sr_ste", "ste", "plain"] = "sr_ste"
    decay: float = 2e-4
    name: ClassVar[str] = "masked"

    def check(self) -> None:
        if self.decay < 0:
            raise StructureError(f"masked: decay must not be negative, got {self.decay}")

    def parts(self) -> tuple[Structure, ...]:
        """The pattern is an argument, not an operand: it holds no weights."""
        return (self.a,)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundMasked:
        inner, pattern = self.a.bind(in_shape, out_shape), self.pattern.bind(in_shape, out_shape)
        if not hasattr(pattern, "mask"):
            raise StructureError(
                "masked: pattern must be unstructured(...), n_m_sparse(...), random_sparse(...), block_sparse(...) or "
                f"channel_sparse(...), got {self.pattern.short()}"
            )
        resolved = dataclasses.replace(self, a=inner.structure, pattern=pattern.structure)
        return BoundMasked(resolved, in_shape, out_shape, inner, pattern)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if inner := self.a.candidates(in_shape, out_shape):
            return [dataclasses.replace(self, a=a) for a in inner]
        return [dataclasses.replace(self, pattern=p) for p in self.pattern.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundMasked(Wrapper):
    """Masked with sizes: parameters of `a` under `weights`, and beside them the support when it is random."""

    pattern: Bound

    @property
    def exact(self) -> bool:
        """The optimum for a dense `a` and a mask that follows the magnitudes."""
        return isinstance(self.inner, BoundDense) and self.pattern.exact

    @property
    def grams(self) -> str:
        """The pattern's, for a dense `a`."""
        return self.pattern.grams if isinstance(self.inner, BoundDense) else "none"

    def _gain(self, gain: float) -> float:
        """Of the weights, where the pattern makes up for the entries it takes away."""
        return gain * getattr(self.pattern, "gain", 1.0)

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return {"weights": self.inner.leaves(in_axes, out_axes, self._gain(gain))} | self.pattern.mask_leaves(
            in_axes, out_axes
        )

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        inner, support = jax.random.split(key)
        drawn = {
            name: self.pattern._sample(name, leaf, support, dtype)
            for name, leaf in self.pattern.mask_leaves(None, None).items()
            if isinstance(leaf, Leaf)
        }
        return {"weights": self.inner.init(inner, dtype, self._gain(gain))} | drawn

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return x @ self.materialize(params)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return y @ self.materialize(params).T

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.take(self.materialize(params), ids, axis=0)

    def materialize(self, params: Params) -> jax.Array:
        """mask * A; its gradient with respect to `params` is the rule's."""
        w = self.inner.materialize(params["weights"])
        mask = self.pattern.mask(jax.lax.stop_gradient(w), params)
        if self.structure.rule == "sr_ste":
            return sr_ste(w, mask, self.structure.decay)
        kept = jnp.where(mask, w, 0)
        return ste(kept, w) if self.structure.rule == "ste" else kept

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """`a` projected as if there were no mask, so that with a dense `a` masked entries keep their value for training.

        The optimum for a dense `a` (given the support, where that is random); for others no better than `a`'s own
        projection masked, but never worse than `like`. Grams need a dense `a`, whose masked entries are then zero.
        """
        self.check_dense(w)
        if in_gram is None and out_gram is None:
            target = w
        elif isinstance(self.inner, BoundDense):
            best = self.pattern.project(w, key=key, like=like, in_gram=in_gram, out_gram=out_gram)
            target = self.pattern.materialize(best)
        else:
            self.no_gram(in_gram, out_gram)
        stored = {}
        if names := self.pattern.mask_leaves(None, None):
            support = self.pattern.project(target, key=key, like=like)
            stored = {name: support[name] for name in names}
        inner_like = None if like is None else like["weights"]
        new = {"weights": self.inner.project(target, key=key, like=inner_like)} | stored
        return keep_better(self, w, new, like, in_gram, out_gram)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """Parameters and bits as stored (dense), `flops` of the sparse algorithm, `flops_executed` dense on both paths."""
        executed = self.inner._materialize_flops() + 2 * rows * self.d_in * self.d_out
        return dataclasses.replace(Bound.cost(self, rows, dtype, path), flops_executed=executed)

    def _flops(self, rows: int) -> int:
        return self.inner._materialize_flops() + self.pattern._flops(rows)
