"""The contract of a structure with sizes: a `Bound` declares its leaves and carries every function.

A recipe, `low_rank(rank=8)`, has no parameters; `recipe.bind(in_shape, out_shape)` checks the sizes and returns a Bound. A
Bound is hashable, so it can be a static argument. Arrays never live here: parameters are plain nested dicts passed to pure
functions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import only_xla
from structmat.structures.errors import StructureError, suggest
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, count_params, flatten_leaves
from structmat.structures.recipe import Structure


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
    is_linear: ClassVar[bool] = True
    """Whether it is a matrix; else only `matmul`, `take` and the accounting are there."""
    exact: ClassVar[bool] = True
    """Whether `project` returns the proven optimum."""
    grams: ClassVar[Literal["none", "diagonal", "full"]] = "none"
    """The grams with which `project` has a closed form."""

    splits: ClassVar[tuple[Literal["in", "out", "paired"], ...]] = ()
    """Sides on which `matmul` also takes the parts one device holds of the leaves: `out` gives those columns of y, `in` a
    summand of y from those columns of x, `paired` the columns of y that the columns of x reach."""

    @property
    def d_in(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.in_shape)

    @property
    def d_out(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.out_shape)

    @property
    def may_densify(self) -> bool:
        """Whether a product may form the dense matrix instead, where that is faster."""
        return self.is_linear

    @property
    def is_complex(self) -> bool:
        """Whether the matrix has complex entries, and so a real input a complex output."""
        dtypes = [leaf.dtype for _, leaf in flatten_leaves(self.leaves())]
        return any(d is not None and jnp.issubdtype(d, jnp.complexfloating) for d in dtypes)

    def rebind(self, structure: Structure) -> Bound:
        """Another structure at this one's place: of the same sizes and, where this is no plain matrix, of the same kind.

        Raises:
          StructureError: it does not fit.
        """
        return structure.bind(self.in_shape, self.out_shape)

    def __repr__(self) -> str:
        return f"{self.structure.short()}: {self.in_shape} -> {self.out_shape}"

    def auxiliary(self, params: Params, x: jax.Array) -> jax.Array | None:
        """A term of the training loss that depends on the input x `(..., d_in)`, f32 (), beside the task's; None for
        none."""
        return None

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
            name = self._gain_leaf(leaves)
            if name not in leaves:
                raise StructureError(
                    f"{self.structure.short()} has no leaf that scales the matrix, so it cannot start at {gain} times "
                    f"its size; put one beside it, as in {self.structure.short()} @ diagonal()"
                )
            leaves[name] = dataclasses.replace(leaves[name], std=leaves[name].std * gain)
        return leaves

    def _gain_leaf(self, leaves: Leaves) -> str:
        """The leaf a gain acts on: `last`, or where that is frozen the last trainable one, lest it never leaves zero."""
        trainable = [n for n, leaf in leaves.items() if leaf.trainable and leaf.law != "index"]
        if not self.last:
            return ""
        return self.last if self.last in trainable or not trainable else trainable[-1]

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        """Draw parameters; traceable, shapes independent of values, index leaves made inside."""
        leaves = self.leaves(gain=gain)
        keys = dict(zip(leaves, jax.random.split(key, len(leaves))))
        return {name: self._sample(name, leaf, keys[name], dtype) for name, leaf in leaves.items()}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        dtype = leaf.dtype or dtype
        if leaf.std == 0:
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
        if self.is_complex:
            y = y.astype(jnp.result_type(y.dtype, jnp.complex64))
        shape = jax.ShapeDtypeStruct((*y.shape[:-1], self.d_in), y.dtype)
        with only_xla():
            return jax.linear_transpose(lambda x: self.matmul(params, x).astype(y.dtype), shape)(y)[0]

    def transpose(self) -> Bound:
        """The Bound of the transposed matrix over the same parameters."""
        from structmat.structures.wrappers import Transpose

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
    def dense_params(self) -> int:
        """Real numbers of the dense matrix."""
        return self.d_in * self.d_out * (2 if self.is_complex else 1)

    @property
    def params(self) -> int:
        """Stored real numbers, as in `cost`."""
        return sum(count_params(leaf) for _, leaf in flatten_leaves(self.leaves()))


def rows_of(x: jax.Array) -> int:
    """Number of vectors in x `(..., d)`."""
    return math.prod(x.shape[:-1])
