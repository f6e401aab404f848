"""The contract of a structure: a `Structure` is a recipe, a `Bound` knows its sizes and carries every function.

A recipe is a frozen dataclass of static choices, `low_rank(rank=8)`. `recipe.bind(in_shape, out_shape)` checks the
sizes and returns a `Bound`, the only thing that has parameters. A Bound is hashable, so it can be a static argument.
Arrays never live here: parameters are plain nested dicts passed to pure functions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from structmat.structures.errors import StructureError, nearest, suggest

Shape = tuple[int, ...]
Axes = str | tuple[str | None, ...] | None
Params = Mapping[str, Any]
InitMode = Literal["spectral", "variance", "paper"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a structure, declared once; init, sharding, learning rates, decay and bits all derive from it.

    Attributes:
      shape: of the array.
      axes: logical axis name (or None) per dimension.
      fan_in: how many inputs of RMS 1 one output of this factor's product sums over.
      fan_out: how many outputs one input of this factor's product reaches.
      std: standard deviation at initialisation.
      law: `normal`, `uniform` (of that std), `zeros`, `ones` (times std), `index` (drawn by the family) or `derived`
        (computed by the family from its other leaves).
      dtype: None for the parameter dtype asked for at init, else fixed (int32 for indices).
      trainable: False for frozen and integer leaves; those live in the Flax collection `frozen`.
      decay: whether weight decay applies.
      share: number of trainable factors in the chain times number of trainable terms in the sum; the learning-rate
        multiplier is divided by it.
      embed_fan: fan_in when the input is one-hot (embeddings).
      mode: the init mode `std` follows, so that a transposed view can follow it too.
      fixed_rate: the learning-rate multiplier is 1 (learned scales, which see no fan).
    """

    shape: Shape
    axes: tuple[str | None, ...]
    fan_in: int
    fan_out: int
    std: float
    law: str = "normal"
    dtype: Any = None
    trainable: bool = True
    decay: bool = True
    share: int = 1
    embed_fan: int = 1
    mode: str = "spectral"
    fixed_rate: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def bits(self, dtype: Any = jnp.float32) -> int:
        """Stored bits when free leaves are kept in `dtype`."""
        return self.size * jnp.dtype(self.dtype or dtype).itemsize * 8


Leaves = dict[str, "Leaf | Leaves"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product costs.

    Attributes:
      params: stored real numbers (a complex entry is two); indices are not parameters.
      bits: stored bits, indices, masks and scales included.
      flops: floating point operations of the structure's own algorithm, 2 per multiply-add.
      flops_executed: the same for the path taken (`dense` materialises first).
      bytes: memory traffic of a product that reads weights and input once and writes the output once.
    """

    params: int
    bits: int
    flops: int
    flops_executed: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


def flatten_leaves(leaves: Leaves, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """Yield (slash path, Leaf) in declared order."""
    for name, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            yield prefix + name, leaf
        else:
            yield from flatten_leaves(leaf, f"{prefix}{name}/")


def map_leaves(fn: Any, leaves: Leaves, *rest: Any) -> dict[str, Any]:
    """Apply `fn(leaf, *rest_values)` over a nested dict of leaves, keeping its nesting."""
    return {
        name: fn(leaf, *(r[name] for r in rest))
        if isinstance(leaf, Leaf)
        else map_leaves(fn, leaf, *(r[name] for r in rest))
        for name, leaf in leaves.items()
    }


def _as_shape(shape: int | Shape, what: str) -> Shape:
    out = (shape,) if isinstance(shape, int) else tuple(shape)
    if not out or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in out):
        raise StructureError(f"{what} must be a positive int or a tuple of them, got {shape!r}")
    return out


def first_axis(axes: Axes) -> str | None:
    """The logical axis of a flattened side: the name of its leading dimension."""
    return axes if axes is None or isinstance(axes, str) else (axes[0] if axes else None)


def check_value(value: Any, hint: Any, what: str) -> Any:
    """Return `value` as `hint` (int -> float is the one conversion); a wrong type or choice is a StructureError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return check_value(value, option, what)
            except StructureError:
                continue
        raise StructureError(f"{what} must be {_show_hint(hint)}, got {value!r}")
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise StructureError(f"{what} got {value!r}" + suggest(str(value), map(str, args)))
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(check_value(v, args[0], what) for v in value)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and hint not in (float,) and type(value) is hint:
        return value
    if isinstance(hint, type) and issubclass(hint, Structure) and isinstance(value, hint):
        return value
    raise StructureError(f"{what} must be {_show_hint(hint)}, got {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Resolved field types; reading them is slow and `fit` builds thousands of members."""
    return typing.get_type_hints(cls)


def _show_hint(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_show_hint(a) for a in args)
    if origin is tuple:
        return f"a tuple of {_show_hint(args[0]).split()[-1]}s"
    if hint is type(None):
        return "None"
    return {int: "an int", float: "a float", str: "a string", Structure: "a structure"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Structure:
    """A recipe: static choices without sizes.

    Every family takes, besides its own arguments:
      init: `spectral` (std sqrt(min(f, g))/f per factor, goes with structure-aware learning rates), `variance`
        (output RMS equals input RMS) or `paper` (the method's own).
      train: names of the leaves that train, or None for the family's own choice; the rest is frozen.
    """

    _: dataclasses.KW_ONLY
    init: InitMode = "spectral"
    train: tuple[str, ...] | None = None

    name: ClassVar[str]

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = check_value(getattr(self, field.name), hints[field.name], f"{self.name}: {field.name}")
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Refuse argument values no size could make valid."""

    def need(self, **least: int) -> None:
        """Refuse an int argument that is set and below its least value."""
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise StructureError(f"{self.name}: {name} must be at least {low}, got {value}")

    def bind(self, in_shape: int | Shape, out_shape: int | Shape) -> Bound:
        """Check the sizes and return the Bound for a weight of `in_shape` x `out_shape`.

        Raises:
          StructureError: sizes that do not fit, naming the values and the nearest valid choice.
        """
        return self._bind(
            _as_shape(in_shape, f"{self.name}: in_shape"), _as_shape(out_shape, f"{self.name}: out_shape")
        )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> Bound:
        raise TypeError(f"{type(self).__name__} does not define _bind")

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """Members of the family that fit these sizes, cheapest first; `fit` chooses among them. Empty if fixed."""
        return []

    def required(self, *names: str) -> None:
        """Refuse to bind while one of these arguments is unset."""
        for name in names:
            if getattr(self, name) is None:
                raise StructureError(
                    f"{self.name} needs {name}=...; set it, or let fit({self.name}(...), params=0.25) choose it"
                )

    def choose(self, argument: str, valid: list[int], in_shape: Shape, out_shape: Shape) -> None:
        """Refuse an int argument that is not among `valid` for these sizes."""
        value = getattr(self, argument)
        if value not in valid:
            raise StructureError(
                f"{self.name}: {argument}={value} does not fit a weight of shape "
                f"({math.prod(in_shape)}, {math.prod(out_shape)}); nearest valid: {nearest(value, valid)}"
            )

    @classmethod
    def own_fields(cls) -> list[dataclasses.Field[Any]]:
        """The family's own arguments in declared order, without `init` and `train`."""
        return [f for f in dataclasses.fields(cls) if f.name not in ("init", "train")]

    @classmethod
    def text_fields(cls) -> list[dataclasses.Field[Any]]:
        """All arguments in the order of the text form: the family's own, then `init` and `train`."""
        return cls.own_fields() + [f for f in dataclasses.fields(cls) if f.name in ("init", "train")]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in self.text_fields())})"

    __repr__ = __str__

    def short(self) -> str:
        """The text form without arguments left at their default; for tables and logs."""
        shown = [f for f in self.text_fields() if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __add__(self, other: Structure) -> Structure:
        from structmat.structures.algebra import Sum

        return Sum.of(self, other) if isinstance(other, Structure) else NotImplemented

    def __matmul__(self, other: Structure) -> Structure:
        from structmat.structures.algebra import Product

        return Product(self, other) if isinstance(other, Structure) else NotImplemented


@dataclasses.dataclass(frozen=True, repr=False)
class Bound:
    """A structure with sizes: declares its leaves and carries every function of the contract.

    All functions are pure and act on the flattened matrix, x `(..., d_in)` -> `(..., d_out)`, W `(d_in, d_out)`.
    A family defines `_leaves`, `matmul`, `materialize`, `project`, `_flops` and may override the rest.
    """

    structure: Structure
    in_shape: Shape
    out_shape: Shape

    last: ClassVar[str] = ""
    """Name of the leaf that is linear in the output: scaling it scales the matrix."""
    exact: ClassVar[bool] = True
    """Whether `project` returns the proven optimum."""

    @property
    def d_in(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.in_shape)

    @property
    def d_out(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.out_shape)

    def __repr__(self) -> str:
        return f"{self.structure.short()}: {self.in_shape} -> {self.out_shape}"

    # -- declaration and initialisation ------------------------------------------------------------------------------

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        raise TypeError(f"{type(self).__name__} does not define _leaves")

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        """Declare every array.

        Args:
          in_axes, out_axes: logical axis name of the site's input and output (one name, or one per dimension).
          gain: factor on the initial matrix (0 starts at the zero matrix), applied to the `last` leaf.
        """
        leaves = dict(self._leaves(in_axes, out_axes))
        train = self.structure.train
        if train is not None:
            for name in train:
                if name not in leaves:
                    raise StructureError(f"{self.structure.name}: train has no leaf {name!r}" + suggest(name, leaves))
            count = sum(1 for n in train if leaves[n].trainable)
            leaves = {
                n: dataclasses.replace(leaf, trainable=leaf.trainable and n in train, share=max(count, 1))
                for n, leaf in leaves.items()
            }
        if gain != 1.0:
            leaves[self.last] = dataclasses.replace(leaves[self.last], std=leaves[self.last].std * gain)
        return leaves

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        """Draw parameters; traceable, shapes independent of values, index leaves made inside."""
        leaves = self.leaves(gain=gain)
        keys = dict(zip(leaves, jax.random.split(key, len(leaves))))
        return {name: self._sample(name, leaf, keys[name], dtype) for name, leaf in leaves.items()}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        dtype = leaf.dtype or dtype
        if leaf.law == "zeros" or leaf.std == 0:
            return jnp.zeros(leaf.shape, dtype)
        if leaf.law == "ones":
            return jnp.full(leaf.shape, leaf.std, dtype)
        if leaf.law == "uniform":
            bound = leaf.std * math.sqrt(3.0)
            return jax.random.uniform(key, leaf.shape, dtype, -bound, bound)
        if leaf.law == "normal":
            return jax.random.normal(key, leaf.shape, dtype) * jnp.asarray(leaf.std, jnp.finfo(dtype).dtype)
        raise TypeError(f"{type(self).__name__}: leaf {name!r} has law {leaf.law!r}, which _sample does not draw")

    def factor(
        self,
        shape: Shape,
        axes: tuple[str | None, ...],
        fan_in: int,
        fan_out: int,
        share: int,
        embed_fan: int = 1,
        **overrides: Any,
    ) -> Leaf:
        """A dense factor with the standard deviation of the recipe's `init` (uniform +-1/sqrt(fan_in) for `paper`)."""
        mode = self.structure.init
        std = {
            "spectral": math.sqrt(min(fan_in, fan_out)) / fan_in,
            "variance": 1 / math.sqrt(fan_in),
            "paper": 1 / math.sqrt(3 * fan_in),
        }[mode]
        law = "uniform" if mode == "paper" else "normal"
        leaf = Leaf(shape, axes, fan_in, fan_out, std, law=law, share=share, embed_fan=embed_fan, mode=mode)
        return dataclasses.replace(leaf, **overrides)

    # -- products ----------------------------------------------------------------------------------------------------

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        """x `(..., d_in)` -> `(..., d_out)`, equal to `x @ materialize(params)`."""
        raise TypeError(f"{type(self).__name__} does not define matmul")

    def materialize(self, params: Params) -> jax.Array:
        """The dense `(d_in, d_out)` matrix."""
        raise TypeError(f"{type(self).__name__} does not define materialize")

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """Rows of the matrix: ids `(...)` -> `(..., d_out)`. Never one-hot; by default through `materialize`."""
        return jnp.take(self.materialize(params), ids, axis=0)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        """The transposed product: y `(..., d_out)` -> `(..., d_in)`."""
        shape = jax.ShapeDtypeStruct((*y.shape[:-1], self.d_in), y.dtype)
        return jax.linear_transpose(lambda x: self.matmul(params, x).astype(y.dtype), shape)(y)[0]

    def transpose(self) -> Bound:
        """The Bound of the transposed matrix over the same parameters."""
        from structmat.structures.algebra import Transpose

        return Transpose(self.structure).over(self)

    # -- from a dense matrix -----------------------------------------------------------------------------------------

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Parameters nearest to the dense `w` `(d_in, d_out)` in Frobenius norm.

        Args:
          key: only for families that draw a support.
          like: parameters to start from; the result is never worse.
          in_gram, out_gram: weight the error as |A^(1/2) (w - M) B^(1/2)|; a vector (diagonal) or a PSD matrix.

        Raises:
          StructureError: wrong shape, or a gram for which the family has no closed form.
        """
        raise TypeError(f"{type(self).__name__} does not define project")

    def check_dense(self, w: jax.Array) -> None:
        """Refuse a dense matrix of another shape."""
        if w.shape != (self.d_in, self.d_out):
            raise StructureError(
                f"{self.structure.name}: cannot project an array of shape {w.shape}; expected ({self.d_in}, {self.d_out})"
            )

    def no_gram(self, in_gram: jax.Array | None, out_gram: jax.Array | None) -> None:
        """Refuse grams where the weighted optimum has no closed form."""
        for side, gram in (("in_gram", in_gram), ("out_gram", out_gram)):
            if gram is not None:
                raise StructureError(f"{self.structure.name}: no closed form with {side}; leave it out")

    # -- accounting --------------------------------------------------------------------------------------------------

    def _flops(self, rows: int) -> int:
        raise TypeError(f"{type(self).__name__} does not define _flops")

    def _materialize_flops(self) -> int:
        """FLOPs of `materialize`."""
        return self._flops(self.d_in)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """Cost of one product with `rows` rows; `path` is `factored` or `dense` (materialise, then one GEMM)."""
        if path not in ("factored", "dense"):
            raise StructureError(f"cost: path must be 'factored' or 'dense', got {path!r}")
        flat = [leaf for _, leaf in flatten_leaves(self.leaves())]
        bits = sum(leaf.bits(dtype) for leaf in flat)
        flops = self._flops(rows)
        dense = self._materialize_flops() + 2 * rows * self.d_in * self.d_out
        return Cost(
            params=sum(count_params(leaf) for leaf in flat),
            bits=bits,
            flops=flops,
            flops_executed=flops if path == "factored" else dense,
            bytes=bits // 8 + rows * (self.d_in + self.d_out) * jnp.dtype(dtype).itemsize,
        )

    @property
    def params(self) -> int:
        """Stored real numbers, as in `cost`."""
        return sum(count_params(leaf) for _, leaf in flatten_leaves(self.leaves()))


def count_params(leaf: Leaf) -> int:
    """Real numbers in a leaf: a complex entry is two, an index is none."""
    dtype = jnp.dtype(leaf.dtype or jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return 2 * leaf.size
    return leaf.size if jnp.issubdtype(dtype, jnp.floating) else 0


def rows_of(x: jax.Array) -> int:
    """Number of vectors in x `(..., d)`."""
    return math.prod(x.shape[:-1])
