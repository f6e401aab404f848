"""`Matrix`: a structure with its parameters, for people at a prompt."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.algebra import BoundProduct, BoundSum, Product, Sum
from structmat.structures.base import Bound
from structmat.structures.display import LeafSummary, summarize, to_html
from structmat.structures.elementwise import BoundElementwise, Elementwise
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Cost, Params
from structmat.structures.recipe import Structure
from structmat.structures.stacks import solve
from structmat.structures.text import parse
from structmat.structures.wrappers import BoundScaled, Scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Matrix:
    """A pytree of parameters with a static Bound.

    Vectors are rows, as in a layer: `x @ W` is `(..., d_in)` -> `(..., d_out)`. `W @ V`, `W + V`, `W - V`, `W * V`
    (elementwise), `2.0 * W`, `W / 2.0`, `-W` and `W.T` are Matrices again, over the same arrays.

    Attributes:
      bound: the structure with sizes.
      params: its parameters, a nested dict of arrays.

    Examples:
      >>> W = random("low_rank(rank=8)", 64, 32, jax.random.key(0))
      >>> W
      Matrix(low_rank(rank=8), shape=(64, 32), dtype=float32, params=37.5%, bits=37.5% of dense)
      >>> x = jnp.ones((3, 64))
      >>> (x @ W).shape, (W.T @ W).shape, (2.0 * W).structure.short()
      ((3, 32), (32, 32), 'scaled(low_rank(rank=8), s=2.0)')
    """

    bound: Bound = dataclasses.field(metadata={"static": True})
    params: dict[str, Any]

    __array_priority__ = 1000  # numpy arrays on the left defer to __rmatmul__

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.bound.d_in, self.bound.d_out

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the floating parameters; of the materialised matrix where there are none (a permutation, say)."""
        free = [p for p in jax.tree.leaves(self.params) if jnp.issubdtype(p.dtype, jnp.inexact)]
        return jnp.result_type(*free) if free else jax.eval_shape(self.bound.materialize, self.params).dtype

    @property
    def structure(self) -> Structure:
        """The recipe, all arguments resolved."""
        return self.bound.structure

    @property
    def T(self) -> Matrix:
        """The transpose, over the same arrays."""
        return Matrix(self.bound.transpose(), self.params)

    @property
    def cost(self) -> Cost:
        """Cost of one product with a single row."""
        return self.bound.cost(1, self.dtype)

    @property
    def leaves(self) -> dict[str, LeafSummary]:
        """Slash path -> shape, dtype, trainable, rms of every array."""
        return summarize(self.bound.leaves(), self.params)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.shape[0]:
            raise StructureError(f"cannot multiply an array of shape {x.shape} with a matrix of shape {self.shape}")
        return self.bound.matmul(self.params, x)

    def __add__(self, other: Matrix) -> Matrix:
        if not isinstance(other, Matrix):
            return NotImplemented
        if self.shape != other.shape:
            raise StructureError(f"cannot add matrices of shapes {self.shape} and {other.shape}")
        terms: list[Bound] = []
        params: list[dict[str, Any]] = []
        for m in (self, other):
            if isinstance(m.bound, BoundSum):
                terms += m.bound.terms
                params += [m.params[str(i)] for i in range(len(m.bound.terms))]
            else:
                terms.append(m.bound)
                params.append(m.params)
        structure = Sum.of(*(t.structure for t in terms))
        bound = BoundSum(structure, self.bound.in_shape, self.bound.out_shape, tuple(terms))
        return Matrix(bound, {str(i): p for i, p in enumerate(params)})

    def __matmul__(self, other: Matrix) -> Matrix:
        if not isinstance(other, Matrix):
            raise StructureError(
                f"W @ an array of shape {jnp.shape(other)}: rows come first here, write x @ W.T; "
                "W @ V multiplies two Matrices"
            )
        if self.shape[1] != other.shape[0]:
            raise StructureError(f"cannot multiply matrices of shapes {self.shape} and {other.shape}")
        structure = Product(self.structure, other.structure, inner=self.shape[1])
        bound = BoundProduct(structure, self.bound.in_shape, other.bound.out_shape, self.bound, other.bound)
        return Matrix(bound, {"0": self.params, "1": other.params})

    def __mul__(self, other: float | Matrix) -> Matrix:
        if isinstance(other, Matrix):
            if self.shape != other.shape:
                raise StructureError(f"cannot multiply matrices of shapes {self.shape} and {other.shape} elementwise")
            both = Elementwise(self.structure, other.structure)
            bound = BoundElementwise(both, self.bound.in_shape, self.bound.out_shape, self.bound, other.bound)
            return Matrix(bound, {"0": self.params, "1": other.params})
        number = _static_number(other)
        bound = self.bound
        if isinstance(bound, BoundScaled):
            number, bound = number * bound.structure.s, bound.inner
        if number == 1.0:
            return Matrix(bound, self.params)
        structure = Scaled(bound.structure, number)
        return Matrix(BoundScaled(structure, bound.in_shape, bound.out_shape, bound), self.params)

    __rmul__ = __mul__

    def __truediv__(self, s: float) -> Matrix:
        return self * (1 / _static_number(s))

    def __neg__(self) -> Matrix:
        return self * -1.0

    def __sub__(self, other: Matrix) -> Matrix:
        return self + -other if isinstance(other, Matrix) else NotImplemented

    def materialize(self) -> jax.Array:
        """The dense (d_in, d_out) array."""
        return self.bound.materialize(self.params)

    def error(self, dense: jax.Array) -> jax.Array:
        """Relative Frobenius error |dense - W| / |dense|."""
        self.bound.check_dense(dense)
        return jnp.linalg.norm(dense - self.materialize()) / jnp.linalg.norm(dense)

    def spectrum(self) -> jax.Array:
        """Singular values of the materialised matrix, descending."""
        return jnp.linalg.svd(self.materialize(), compute_uv=False)

    def __repr__(self) -> str:
        cost, entries = self.cost, self.shape[0] * self.shape[1]
        bits = cost.bits / (entries * self.dtype.itemsize * 8)
        share = f"params={cost.params / entries:.1%}, bits={bits:.1%} of dense"
        return f"Matrix({self.structure.short()}, shape={self.shape}, dtype={self.dtype}, {share})"

    def _repr_html_(self) -> str:
        return to_html(self)


def project(
    dense: jax.Array,
    structure: str | Structure,
    *,
    key: jax.Array | None = None,
    like: Params | None = None,
    in_gram: jax.Array | None = None,
    out_gram: jax.Array | None = None,
    limit: int | None = None,
) -> Matrix:
    """The Matrix of a structure nearest to a dense `(d_in, d_out)` array; stacks go to `project_stack`.

    Compiled once per structure and shape. SVDs are exact unless `structmat.svd_method` says otherwise.

    Examples:
      >>> W = project(jnp.arange(64.0).reshape(8, 8), "toeplitz()")      # the mean of each diagonal
      >>> W.params["t"][:4]
      Array([56. , 52.5, 49. , 45.5], dtype=float32)

    Args:
      key, like, in_gram, out_gram: as in `Bound.project`.
      limit: bytes the program may use, arguments and results included; default what the device or host has free.

    Raises:
      StructureError: what `Bound.project` refuses, or a projection that needs more memory than `limit`.
    """
    dense = jnp.asarray(dense)
    if dense.ndim != 2:
        more = "; project_stack projects every matrix of a stack" if dense.ndim > 2 else ""
        raise StructureError(f"project needs a matrix, got an array of shape {dense.shape}{more}")
    bound = parse(structure).bind(*dense.shape)
    return Matrix(bound, solve(bound, dense, key=key, like=like, in_gram=in_gram, out_gram=out_gram, limit=limit))


def random(
    structure: str | Structure, in_shape: int, out_shape: int, key: jax.Array, dtype: Any = jnp.float32
) -> Matrix:
    """A Matrix drawn from the structure's initialisation.

    Examples:
      >>> random("diagonal()", 64, 64, jax.random.key(0)).cost.params
      64
    """
    bound = parse(structure).bind(in_shape, out_shape)
    return Matrix(bound, bound.init(key, dtype))


def _static_number(s: Any) -> float:
    """A real number known now, as a Python float: the factor is part of the structure, not a parameter."""
    known = isinstance(s, numbers.Real | np.ndarray | jax.Array) and not isinstance(s, jax.core.Tracer)
    if not known or isinstance(s, bool) or jnp.ndim(s) or not jnp.isrealobj(s) or not np.isfinite(float(s)):
        what = f"shape {jnp.shape(s)}" if jnp.ndim(s) else repr(s)
        raise StructureError(f"a Matrix is scaled by one real number known before tracing, got {what}")
    return float(s)
