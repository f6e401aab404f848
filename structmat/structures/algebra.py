"""Sums and products of structures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.descent import squared_error
from structmat.structures.errors import StructureError
from structmat.structures.fused import fused_product
from structmat.structures.leaf import Axes, Leaves, Params, Shape, flatten_leaves, map_leaves
from structmat.structures.linalg import jit_projection, working_dtype
from structmat.structures.recipe import Structure
from structmat.structures.wrappers import Frozen, Scaled, Transpose

SWEEPS = 50
"""Alternating sweeps a sum's projection runs at most; each keeps or lowers the error."""
GAIN = 1e-7
"""A sweep that lowers the error by less than this share of it is the last, so stopping early costs less than 5e-6."""
_LEVELS = ("none", "diagonal", "full")
"""`Bound.grams` by the number of axes of the gram."""


@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Composite):
    """`a + b`: W = A + B. Parameters nest under `0`, `1`, ... in text order.

    At initialisation each of k trainable terms gets 1/k of the variance; with a term that does not train, or whose size
    is fixed, the others start at zero, so the sum starts exactly at that term. Terms with `init='paper'` start as their paper says.
    """

    terms: tuple[Structure, ...] = ()
    name: ClassVar[str] = "sum"
    adds_auxiliary: ClassVar[bool] = True

    @staticmethod
    def of(*terms: Structure) -> Sum:
        """Sum with nested sums flattened."""
        flat: list[Structure] = []
        for term in terms:
            flat.extend(term.terms if isinstance(term, Sum) else [term])
        return Sum(tuple(flat))

    def parts(self) -> tuple[Structure, ...]:
        return self.terms

    def _text(self, show: Callable[[Structure], str]) -> str:
        return " + ".join(show(t) for t in self.terms)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundSum:
        terms = tuple(t.bind(in_shape, out_shape) for t in self.terms)
        return BoundSum(Sum(tuple(t.structure for t in terms)), in_shape, out_shape, terms)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundSum(Bound):
    """Sum with sizes."""

    terms: tuple[Bound, ...]

    exact: ClassVar[bool] = False

    @property
    def grams(self) -> str:
        """The grams every term takes."""
        return min((t.grams for t in self.terms), key=_LEVELS.index)

    @property
    def splits(self) -> tuple[str, ...]:
        """The sides every term takes in parts."""
        return tuple(side for side in ("in", "out") if all(side in t.splits for t in self.terms))

    @property
    def is_complex(self) -> bool:
        return any(t.is_complex for t in self.terms)

    @property
    def is_linear(self) -> bool:
        return all(t.is_linear for t in self.terms)

    @property
    def may_densify(self) -> bool:
        return all(t.may_densify for t in self.terms)

    def _named(self) -> list[tuple[str, Bound]]:
        return [(str(i), t) for i, t in enumerate(self.terms)]

    def _trainable(self) -> int:
        return sum(trains(t) for t in self.terms)

    def _gains(self, gain: float) -> list[float]:
        moves = [trains(t) and scales(t) for t in self.terms]
        split = gain * max(self._trainable(), 1) ** -0.5 if all(moves) else 0.0
        return [split if m and t.structure.init != "paper" else gain for m, t in zip(moves, self.terms)]

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        k = max(self._trainable(), 1)
        share = lambda leaf: dataclasses.replace(leaf, share=leaf.share * k)
        return {
            name: map_leaves(share, term.leaves(in_axes, out_axes, g))
            if trains(term)
            else term.leaves(in_axes, out_axes, g)
            for (name, term), g in zip(self._named(), self._gains(gain))
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        keys = jax.random.split(key, len(self.terms))
        return {n: t.init(k, dtype, g) for (n, t), k, g in zip(self._named(), keys, self._gains(gain))}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        if product := fused_product(self.terms):
            return product(params, x)
        return sum(t.matmul(params[n], x) for n, t in self._named())

    def auxiliary(self, params: Params, x: jax.Array) -> jax.Array | None:
        """Those of the terms."""
        found = [extra for n, t in self._named() if (extra := t.auxiliary(params[n], x)) is not None]
        return sum(found) if found else None

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return sum(t.rmatmul(params[n], y) for n, t in self._named())

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return sum(t.take(params[n], ids) for n, t in self._named())

    def materialize(self, params: Params) -> jax.Array:
        return sum(t.materialize(params[n]) for n, t in self._named())

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Alternating projection: each term in turn takes the nearest member to what the others leave.

        A step is kept only where it lowers the (weighted) error, so the error never rises, and the result is never worse
        than `like`. Without `like` it starts twice, from the terms projected greedily in text order and in the opposite
        one, and the better end is kept: which term comes first decides what each one explains. Where the terms' own
        projections are optimal every step is the global optimum of its block given the others (block coordinate
        descent; GoDec, Zhou and Tao 2011, for low rank plus sparse): at equal sweeps the error is that of the
        alternating reference. It ends where a sweep gains less than GAIN, or after SWEEPS of them; not a proven
        optimum. Grams need every term to take them in closed form.
        """
        self.check_dense(w)
        for side, gram in (("in_gram", in_gram), ("out_gram", out_gram)):
            if gram is not None and _LEVELS.index(self.grams) < min(gram.ndim, 2):
                weak = next(t for t in self.terms if _LEVELS.index(t.grams) < min(gram.ndim, 2))
                raise StructureError(
                    f"{weak.structure.name} has no closed form with a {_LEVELS[min(gram.ndim, 2)]} {side}, "
                    "so neither has the sum; leave it out"
                )
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(self.terms))
        grams = (in_gram, out_gram)
        target = w.astype(working_dtype(w))
        if like is None:
            ends = [self._descend(target, self._greedy(target, order, keys, grams), keys, grams) for order in (1, -1)]
            (params, error), (other, least) = ends
            params = jax.tree.map(lambda a, b: jnp.where(least < error, b, a), params, other)
        else:
            start = {
                n: jax.tree.map(functools.partial(_widened, dtype=target.dtype), like[n]) for n, _ in self._named()
            }
            params, _ = self._descend(target, start, keys, grams)
        if target.dtype == w.dtype:
            return params
        own = jax.eval_shape(functools.partial(self.init, dtype=w.dtype), jax.random.key(0))
        return jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, own)

    def _greedy(self, target: jax.Array, order: int, keys: jax.Array, grams: tuple[Any, Any]) -> dict[str, Any]:
        """Each term projected from what those before it leave, in text order (1) or the opposite one (-1)."""
        params: dict[str, Any] = {}
        for (name, term), key in list(zip(self._named(), keys))[::order]:
            params[name] = term.project(target, key=key, in_gram=grams[0], out_gram=grams[1])
            target = target - term.materialize(params[name])
        return {name: params[name] for name, _ in self._named()}

    def _descend(
        self, target: jax.Array, params: dict[str, Any], keys: jax.Array, grams: tuple[Any, Any]
    ) -> tuple[dict[str, Any], jax.Array]:
        """Where alternation from `params` ends, and its squared (weighted) error."""
        params = _alternate(self, SWEEPS, params, target - self.materialize(params), keys, grams)
        return params, squared_error(target - self.materialize(params), *grams)

    def _flops(self, rows: int) -> int:
        return sum(t._flops(rows) for t in self.terms)

    def _materialize_flops(self) -> int:
        return sum(t._materialize_flops() for t in self.terms)


def _widened(value: jax.Array, dtype: Any) -> jax.Array:
    """A floating array in at least `dtype`'s precision; others as they are."""
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, dtype)) if value.dtype in (jnp.bfloat16, jnp.float16) else value


@jit_projection(0, 1)
def _alternate(
    bound: BoundSum,
    sweeps: int,
    params: dict[str, Any],
    rest: jax.Array,
    keys: jax.Array,
    grams: tuple[jax.Array | None, jax.Array | None],
) -> dict[str, Any]:
    """At most `sweeps` over the terms, until one lowers the error by less than GAIN of it; `rest` = w - materialize(params)."""
    size = lambda rest: jnp.sqrt(jnp.maximum(squared_error(rest, *grams), 0))

    def sweep(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, _, params, rest, before = carry
        params, error = dict(params), before
        for (name, term), key in zip(bound._named(), keys):
            target = rest + term.materialize(params[name])
            new = term.project(target, key=key, like=params[name], in_gram=grams[0], out_gram=grams[1])
            new_rest = target - term.materialize(new)
            new_error = size(new_rest)
            better = new_error < error
            pick = lambda fresh, old: jnp.where(better, fresh, old).astype(old.dtype)  # noqa: B023, called at once
            params[name] = jax.tree.map(pick, new, params[name])
            rest, error = jnp.where(better, new_rest, rest), jnp.where(better, new_error, error)
        return count + 1, before - error > GAIN * before, params, rest, error

    going = lambda carry: (carry[0] < sweeps) & carry[1]
    start = (jnp.zeros((), jnp.int32), jnp.array(True), params, rest, size(rest))
    return jax.lax.while_loop(going, sweep, start)[2]


def trains(bound: Bound) -> bool:
    """Whether any leaf trains."""
    return any(leaf.trainable for _, leaf in flatten_leaves(bound.leaves()))


@dataclasses.dataclass(frozen=True, repr=False)
class Product(Composite):
    """`a @ b` or `product(a, b, inner=64)`: W = A B, with the inner size fixed by `inner` (default d_out)."""

    a: Structure
    b: Structure
    inner: int | None = None
    name: ClassVar[str] = "product"

    def check(self) -> None:
        self.need(inner=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundProduct:
        inner = (self.inner,) if self.inner else self._implied(in_shape, out_shape)
        a, b = self.a.bind(in_shape, inner), self.b.bind(inner, out_shape)
        return BoundProduct(Product(a.structure, b.structure, self.inner), in_shape, out_shape, a, b)

    def _implied(self, in_shape: Shape, out_shape: Shape) -> Shape:
        if _square(self.a):
            return in_shape
        if _square(self.b):
            return out_shape
        raise StructureError(
            f"product: neither {self.a.short()} nor {self.b.short()} fixes the inner size; "
            f"write product({self.a.short()}, {self.b.short()}, inner=64)"
        )


def _square(structure: Structure) -> bool:
    if isinstance(structure, Frozen | Scaled | Transpose):
        return _square(structure.a)
    if isinstance(structure, Product):
        return _square(structure.a) and _square(structure.b)
    return getattr(structure, "square", False)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundProduct(Bound):
    """Product with sizes; parameters nest under `0` (a) and `1` (b)."""

    a: Bound
    b: Bound

    exact: ClassVar[bool] = False

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        ga, gb = self._gains(gain)
        a, b = self.a.leaves(in_axes, None, ga), self.b.leaves(None, out_axes, gb)
        both = trains(self.a) and trains(self.b)
        add = lambda n: lambda leaf: dataclasses.replace(leaf, share=leaf.share + n) if both else leaf
        return {"0": map_leaves(add(most_share(b)), a), "1": map_leaves(add(most_share(a)), b)}

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        ka, kb = jax.random.split(key)
        ga, gb = self._gains(gain)
        return {"0": self.a.init(ka, dtype, ga), "1": self.b.init(kb, dtype, gb)}

    def _gains(self, gain: float) -> tuple[float, float]:
        """A gain acts on the second factor, or on the first where only that trains or can be scaled."""
        first = (trains(self.a) and not trains(self.b)) or (scales(self.a) and not scales(self.b))
        return (gain, 1.0) if first else (1.0, gain)

    @property
    def is_complex(self) -> bool:
        return self.a.is_complex or self.b.is_complex

    @property
    def is_linear(self) -> bool:
        return self.a.is_linear and self.b.is_linear

    @property
    def may_densify(self) -> bool:
        return self.a.may_densify and self.b.may_densify

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.b.matmul(params["1"], self.a.matmul(params["0"], x))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.a.rmatmul(params["0"], self.b.rmatmul(params["1"], y))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.b.matmul(params["1"], self.a.take(params["0"], ids))

    def materialize(self, params: Params) -> jax.Array:
        return self.b.matmul(params["1"], self.a.materialize(params["0"]))

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """Refused: two arbitrary structured factors have no projection with a guarantee."""
        raise StructureError(f"{self.structure}: no projection onto a general product; project onto one of its factors")

    def _flops(self, rows: int) -> int:
        return self.a._flops(rows) + self.b._flops(rows)

    def _materialize_flops(self) -> int:
        return self.a._materialize_flops() + self.b._flops(self.d_in)


def scales(bound: Bound) -> bool:
    """Whether a gain can act on it."""
    try:
        bound.leaves(gain=0.5)
    except StructureError:
        return False
    return True


def most_share(leaves: Leaves) -> int:
    """Trainable factors of the longest chain in it."""
    return max((leaf.share for _, leaf in flatten_leaves(leaves)), default=0)
