"""Random sparse: the same number of entries in every column, on a support drawn once and kept (SLTrain's sparse part).

Han et al. 2024, "SLTrain", arXiv 2406.02214. Their support is drawn over the whole matrix; here it is drawn per output
column from a key folded with the column, so that columns shard without communication.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import Bound, rows_of
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, scale_rows
from structmat.structures.recipe import Structure
from structmat.structures.sparse_products import gather_product, scatter_product


@dataclasses.dataclass(frozen=True, repr=False)
class RandomSparse(Structure):
    """`random_sparse(density, select='random')`: k = round(density d_in) entries in each column.

    `select` is how `project` chooses the support: `random` draws it from its key (or keeps that of `like`),
    `magnitude` takes the k largest entries of each column. Initialisation draws it at random in both cases. `paper`
    init is SLTrain's: values uniform +-1/sqrt(d_in).
    """

    density: float | None = None
    select: Literal["random", "magnitude"] = "random"
    name: ClassVar[str] = "random_sparse"
    about: ClassVar[About] = About(
        example="random_sparse(density=0.25)",
        formula="d n entries in every column",
        params="d n m, and as many int32 rows",
        flops="2 d n m",
        nearest="optimal on its support, select='magnitude' of all; diagonal grams",
        sharding="over m; no communication column-parallel",
        paper="Han et al. 2024 (SLTrain)",
        when="the tail a low-rank term misses",
    )

    def check(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise StructureError(f"random_sparse: density must be in (0, 1], got {self.density}")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundRandomSparse:
        self.required("density")
        d_in = math.prod(in_shape)
        if round(self.density * d_in) < 1:
            raise StructureError(
                f"random_sparse: density={self.density} leaves no entry in a column of {d_in}; "
                f"smallest density is {1 / d_in:.6g}"
            )
        return BoundRandomSparse(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.density is not None:
            return []
        d_in = math.prod(in_shape)
        return [dataclasses.replace(self, density=k / d_in) for k in range(1, d_in + 1)]


def draw_rows(key: jax.Array, columns: int, size: int, count: int) -> jax.Array:
    """`count` of `size` indices without replacement, ascending, for each of `columns` columns: (columns, count) int32.

    Column o depends on (key, o) alone.
    """

    def column(o: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(key, o), (size,), jnp.uint32)
        return jnp.sort(lax.top_k(bits, count)[1])

    return jax.vmap(column)(jnp.arange(columns)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundRandomSparse(Bound):
    """Random sparse with sizes. Leaves `values` (d_out, k) and the frozen int32 `rows` (d_out, k), ascending per column."""

    grams: ClassVar[str] = "diagonal"
    last: ClassVar[str] = "values"

    @property
    def exact(self) -> bool:
        """With `magnitude` the optimum of the class, with `random` only for the support."""
        return self.structure.select == "magnitude"

    @property
    def count(self) -> int:
        """Entries per column."""
        return round(self.structure.density * self.d_in)

    def _rows_leaf(self, out_axes: Axes) -> Leaf:
        axes = (first_axis(out_axes), None)
        shape = (self.d_out, self.count)
        return Leaf(shape, axes, 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        reach = max(1, round(self.d_out * self.count / self.d_in))
        values = self.factor((self.d_out, self.count), (first_axis(out_axes), None), self.count, reach, share=1)
        if self.structure.init == "paper":
            values = dataclasses.replace(values, std=(3 * self.d_in) ** -0.5)
        return {"values": values, "rows": self._rows_leaf(out_axes)}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if name == "rows":
            return draw_rows(key, self.d_out, self.d_in, self.count)
        return super()._sample(name, leaf, key, dtype)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        y = gather_product(x.reshape(rows_of(x), self.d_in), params["values"], params["rows"])
        return y.reshape(*x.shape[:-1], self.d_out)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        x = scatter_product(y.reshape(rows_of(y), self.d_out), params["values"], params["rows"], self.d_in)
        return x.reshape(*y.shape[:-1], self.d_in)

    def materialize(self, params: Params) -> jax.Array:
        columns = jnp.arange(self.d_out)[:, None]
        empty = jnp.zeros((self.d_out, self.d_in), params["values"].dtype)
        return empty.at[columns, params["rows"]].add(params["values"], unique_indices=True, indices_are_sorted=True).T

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The entries of w on the support: optimal for it, with any diagonal grams.

        With `magnitude` the support is the best one too: per column the k largest |w| (times the root of a diagonal
        in_gram); ties go to the lower index.

        Raises:
          StructureError: a full gram, or `random` without `key` and `like`.
        """
        self.check_dense(w)
        self._check_gram(out_gram, self.d_out, "out_gram")
        root = self._check_gram(in_gram, self.d_in, "in_gram")
        rows = self._support(w, key, like, root)
        return {"values": jnp.take_along_axis(w.T, rows, axis=1), "rows": rows}

    def _check_gram(self, gram: jax.Array | None, size: int, what: str) -> jax.Array | None:
        return None if gram is None else diagonal_roots(gram, size, what, self.structure.name)[0]

    def _support(self, w: jax.Array, key: jax.Array | None, like: Params | None, root: jax.Array | None) -> jax.Array:
        if self.structure.select == "magnitude":
            return self._largest(scale_rows(root, jnp.abs(w)))
        if like is not None:
            return like["rows"]
        if key is None:
            raise StructureError(
                "random_sparse: select='random' draws its support, so project needs key=jax.random.key(...) or like=...; "
                "select='magnitude' takes the largest entries"
            )
        return draw_rows(key, self.d_out, self.d_in, self.count)

    def _largest(self, score: jax.Array) -> jax.Array:
        return jnp.sort(lax.top_k(score.T, self.count)[1], axis=1).astype(jnp.int32)

    def mask_leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """What `masked` stores beside the weights: the support when it is random, else nothing."""
        return {"rows": self._rows_leaf(out_axes)} if self.structure.select == "random" else {}

    def mask(self, w: jax.Array, stored: Params) -> jax.Array:
        """Boolean (d_in, d_out): the stored support, or per column the k largest entries of w."""
        rows = stored["rows"] if "rows" in stored else self._largest(jnp.abs(w))
        return self.materialize({"values": jnp.ones(rows.shape, jnp.int8), "rows": rows}).astype(bool)

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.d_out * self.count

    def _materialize_flops(self) -> int:
        return 0
