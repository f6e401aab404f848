"""Structures made of structures: sum, product, transpose, scaling and freezing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Axes, Bound, Cost, Leaf, Leaves, Params, Shape, Structure, map_leaves
from structmat.structures.errors import StructureError

SWEEPS = 20
"""Alternating sweeps a sum's projection runs at most; each keeps or lowers the error."""


@dataclasses.dataclass(frozen=True, repr=False)
class Composite(Structure):
    """Base of structures made of others: `init` and `train` belong to the parts."""

    def __post_init__(self) -> None:
        for field in ("init", "train"):
            if getattr(self, field) != getattr(Structure, field):
                raise StructureError(f"{self.name}: set {field} on the parts, not on the whole")
        super().__post_init__()

    def parts(self) -> tuple[Structure, ...]:
        """The operands in text order."""
        return tuple(v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Structure))

    def _text(self, show: Callable[[Structure], str]) -> str:
        shown = []
        for f in self.own_fields():
            value = getattr(self, f.name)
            if isinstance(value, Structure):
                shown.append(show(value))
            elif show is str or value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{self.name}({', '.join(shown)})"

    def __str__(self) -> str:
        return self._text(str)

    __repr__ = __str__

    def short(self) -> str:
        return self._text(lambda s: s.short())


@dataclasses.dataclass(frozen=True, repr=False)
class Sum(Composite):
    """`a + b`: W = A + B. Parameters nest under `0`, `1`, ... in text order.

    At initialisation each of k trainable terms gets 1/k of the variance; with a term that does not train the others
    start at zero, so the sum starts exactly at that term. Terms with `init='paper'` start as their paper says.
    """

    terms: tuple[Structure, ...] = ()
    name: ClassVar[str] = "sum"

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

    def _named(self) -> list[tuple[str, Bound]]:
        return [(str(i), t) for i, t in enumerate(self.terms)]

    def _trainable(self) -> int:
        return sum(_trains(t) for t in self.terms)

    def _gains(self, gain: float) -> list[float]:
        fixed = any(not _trains(t) for t in self.terms)
        split = 0.0 if fixed else gain * max(self._trainable(), 1) ** -0.5
        return [split if _trains(t) and t.structure.init != "paper" else gain for t in self.terms]

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        k = max(self._trainable(), 1)
        share = lambda leaf: dataclasses.replace(leaf, share=leaf.share * k)
        return {
            name: map_leaves(share, term.leaves(in_axes, out_axes, g))
            if _trains(term)
            else term.leaves(in_axes, out_axes, g)
            for (name, term), g in zip(self._named(), self._gains(gain))
        }

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        keys = jax.random.split(key, len(self.terms))
        return {n: t.init(k, dtype, g) for (n, t), k, g in zip(self._named(), keys, self._gains(gain))}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return sum(t.matmul(params[n], x) for n, t in self._named())

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

        Every accepted step lowers the Frobenius error, so the result is monotone and never worse than `like` (default:
        terms projected greedily in text order); it is a stationary point, not a proven optimum.
        """
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(self.terms))
        params: dict[str, Any] = {}
        rest = w
        for (name, term), k in zip(self._named(), keys):
            params[name] = jax.tree.map(jnp.asarray, like[name]) if like is not None else term.project(rest, key=k)
            rest = rest - term.materialize(params[name])
        return _alternate(self, params, rest, keys)

    def _flops(self, rows: int) -> int:
        return sum(t._flops(rows) for t in self.terms)

    def _materialize_flops(self) -> int:
        return sum(t._materialize_flops() for t in self.terms)


@functools.partial(jax.jit, static_argnums=0)
def _alternate(bound: BoundSum, params: dict[str, Any], rest: jax.Array, keys: jax.Array) -> dict[str, Any]:
    """Sweeps over the terms until a sweep lowers the error by less than 1e-6 of it; `rest` = w - materialize(params)."""

    def sweep(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        count, _, params, rest, before = carry
        params, error = dict(params), before
        for (name, term), key in zip(bound._named(), keys):
            target = rest + term.materialize(params[name])
            new = term.project(target, key=key, like=params[name])
            new_rest = target - term.materialize(new)
            new_error = jnp.linalg.norm(new_rest)
            better = new_error < error
            pick = lambda fresh, old: jnp.where(better, fresh, old).astype(old.dtype)  # noqa: B023, called at once
            params[name] = jax.tree.map(pick, new, params[name])
            rest, error = jnp.where(better, new_rest, rest), jnp.where(better, new_error, error)
        return count + 1, before - error > 1e-6 * before, params, rest, error

    going = lambda carry: (carry[0] < SWEEPS) & carry[1]
    start = (jnp.zeros((), jnp.int32), jnp.array(True), params, rest, jnp.linalg.norm(rest))
    return jax.lax.while_loop(going, sweep, start)[2]


def _trains(bound: Bound) -> bool:
    flags: list[bool] = []
    map_leaves(lambda leaf: flags.append(leaf.trainable), bound.leaves())
    return any(flags)


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
        if getattr(self.a, "square", False):
            return in_shape
        if getattr(self.b, "square", False):
            return out_shape
        raise StructureError(
            f"product: neither {self.a.short()} nor {self.b.short()} fixes the inner size; "
            f"write product({self.a.short()}, {self.b.short()}, inner=64)"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class BoundProduct(Bound):
    """Product with sizes; parameters nest under `0` (a) and `1` (b)."""

    a: Bound
    b: Bound

    exact: ClassVar[bool] = False

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        a, b = self.a.leaves(in_axes, None), self.b.leaves(None, out_axes, gain)
        both = _trains(self.a) and _trains(self.b)
        add = lambda n: lambda leaf: dataclasses.replace(leaf, share=leaf.share + n) if both else leaf
        return {"0": map_leaves(add(_most_share(b)), a), "1": map_leaves(add(_most_share(a)), b)}

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        ka, kb = jax.random.split(key)
        return {"0": self.a.init(ka, dtype), "1": self.b.init(kb, dtype, gain)}

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


def _most_share(leaves: Leaves) -> int:
    shares: list[int] = []
    map_leaves(lambda leaf: shares.append(leaf.share), leaves)
    return max(shares)


@dataclasses.dataclass(frozen=True, repr=False)
class Wrapper(Bound):
    """A Bound around one other Bound with the same parameters; everything is passed on unless overridden."""

    inner: Bound

    @property
    def exact(self) -> bool:
        return self.inner.exact

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return self.inner.leaves(in_axes, out_axes, gain)

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        return self.inner.init(key, dtype, gain)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.matmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.rmatmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.inner.take(params, ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(params)

    def project(self, w: jax.Array, **kwargs: Any) -> dict[str, Any]:
        return self.inner.project(w, **kwargs)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        return self.inner.cost(rows, dtype, path)

    def _flops(self, rows: int) -> int:
        return self.inner._flops(rows)

    def _materialize_flops(self) -> int:
        return self.inner._materialize_flops()


@dataclasses.dataclass(frozen=True, repr=False)
class Frozen(Composite):
    """`frozen(a)`: no leaf of `a` trains."""

    a: Structure
    name: ClassVar[str] = "frozen"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundFrozen:
        inner = self.a.bind(in_shape, out_shape)
        return BoundFrozen(Frozen(inner.structure), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundFrozen(Wrapper):
    """Frozen with sizes."""

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        freeze = lambda leaf: dataclasses.replace(leaf, trainable=False)
        return map_leaves(freeze, self.inner.leaves(in_axes, out_axes, gain))


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Composite):
    """`scaled(a, s)`: W = s A with a static number s (LoRA's alpha/r, say)."""

    a: Structure
    s: float = 1.0
    name: ClassVar[str] = "scaled"

    def check(self) -> None:
        if self.s == 0:
            raise StructureError("scaled: s must not be 0")

    def _text(self, show: Callable[[Structure], str]) -> str:
        return f"scaled({show(self.a)}, s={self.s!r})"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundScaled:
        inner = self.a.bind(in_shape, out_shape)
        return BoundScaled(Scaled(inner.structure, self.s), in_shape, out_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundScaled(Wrapper):
    """Scaled with sizes."""

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.matmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.rmatmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self.structure.s * self.inner.take(params, ids)

    def materialize(self, params: Params) -> jax.Array:
        return self.structure.s * self.inner.materialize(params)

    def project(self, w: jax.Array, **kwargs: Any) -> dict[str, Any]:
        """As `a`, on w / s."""
        return self.inner.project(w / self.structure.s, **kwargs)


@dataclasses.dataclass(frozen=True, repr=False)
class Transpose(Composite):
    """`transpose(a)`: W = A^T, with `a` bound the other way round."""

    a: Structure
    name: ClassVar[str] = "transpose"

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundTranspose:
        return self.over(self.a.bind(out_shape, in_shape))

    def over(self, inner: Bound) -> BoundTranspose:
        """The transposed view of an existing Bound."""
        return BoundTranspose(Transpose(inner.structure), inner.out_shape, inner.in_shape, inner)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        return [dataclasses.replace(self, a=a) for a in self.a.candidates(out_shape, in_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTranspose(Wrapper):
    """Transpose with sizes: fans swap sides, products and grams too."""

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        return map_leaves(_swap_fans, self.inner.leaves(out_axes, in_axes, gain))

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        rescale = lambda leaf, value: value if leaf.law == "index" else value * _swap_ratio(leaf)
        return map_leaves(rescale, self.inner.leaves(gain=gain), self.inner.init(key, dtype, gain))

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self.inner.rmatmul(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self.inner.matmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return jnp.take(self.materialize(params), ids, axis=0)

    def materialize(self, params: Params) -> jax.Array:
        return self.inner.materialize(params).T

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """As `a`, on the transposed matrix with the grams swapped."""
        self.check_dense(w)
        return self.inner.project(w.T, key=key, like=like, in_gram=out_gram, out_gram=in_gram)

    def transpose(self) -> Bound:
        return self.inner


def _swap_ratio(leaf: Leaf) -> float:
    ratio = leaf.fan_in / leaf.fan_out
    return ratio if leaf.mode == "spectral" else ratio**0.5


def _swap_fans(leaf: Leaf) -> Leaf:
    std = leaf.std * _swap_ratio(leaf)
    return dataclasses.replace(leaf, fan_in=leaf.fan_out, fan_out=leaf.fan_in, std=std, embed_fan=leaf.fan_out)
