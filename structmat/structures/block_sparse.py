"""Block sparse in the blocked ELL layout of block-sparse kernels: the same number of dense blocks in every block column."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse import block_sparse
from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.block_support import pattern_counts, static_rows
from structmat.structures.errors import StructureError
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, scale_columns, scale_rows, working_dtype
from structmat.structures.random_sparse import draw_rows
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class BlockSparse(Structure):
    """`block_sparse(block, density, pattern='random')`: k = round(density d_in / p) blocks (p, s) per block column.

    `block` is (p, s), or one int for both; p divides d_in and s divides d_out. Patterns:
      random: drawn per block column from a key folded with the column.
      magnitude: random at init; `project` takes the blocks of largest norm.
      butterfly: the flat block butterfly of Pixelated Butterfly (Chen et al. 2022, arXiv 2112.00029): block i reads
        itself and the blocks whose number differs from i in one of the lowest binary digits, so k = 1 + the number of
        strides. On other grids the digits are those of gcd(block rows, block columns) nodes in its prime factors, and a
        node stands for rows / gcd block rows and columns / gcd block columns. The paper's layer is
        `block_sparse(..., pattern='butterfly') + low_rank(rank)`.
      banded: k consecutive blocks round the diagonal (scaled where the grid is not square), wrapped round at the ends so
        that all inputs are read equally often on a square grid.

    The density must be one the pattern has: any for random and magnitude, at least 1 / block columns for banded so that
    every input is read, those of whole strides for butterfly.
    """

    block: int | tuple[int, ...] | None = None
    density: float | None = None
    pattern: Literal["random", "butterfly", "banded", "magnitude"] = "random"
    name: ClassVar[str] = "block_sparse"
    about: ClassVar[About] = About(
        example="block_sparse(block=16, density=0.25)",
        formula="d n/p dense blocks (p, s) in every block column",
        params="d n m, and d n m / (p s) int32 rows",
        flops="2 d n m",
        nearest="optimal on its support, pattern='magnitude' of all; diagonal grams",
        sharding="over m; no communication column-parallel",
        paper="Chen et al. 2022 (Pixelated Butterfly); Gray et al. 2017 (block sparse)",
        when="sparsity that runs as GEMMs; with low rank beside it, pixelfly",
        kernel="block_sparse",
    )

    def check(self) -> None:
        sides = self.block if isinstance(self.block, tuple) else (self.block,) * 2
        if self.block is not None and (len(sides) != 2 or min(sides) < 1):
            raise StructureError(f"block_sparse: block must be a positive int or a pair of them, got {self.block}")
        if self.density is not None and not 0 < self.density <= 1:
            raise StructureError(f"block_sparse: density must be in (0, 1], got {self.density}")

    def _block(self, in_shape: Shape, out_shape: Shape) -> tuple[int, int]:
        """(p, s), checked against the sizes."""
        self.required("block")
        sizes = math.prod(in_shape), math.prod(out_shape)
        if isinstance(self.block, int):
            self.choose("block", divisors(math.gcd(*sizes)), in_shape, out_shape)
            return self.block, self.block
        near = tuple(min(divisors(n), key=lambda d, b=b: (abs(d - b), d)) for n, b in zip(sizes, self.block))
        if near != self.block:
            raise StructureError(
                f"block_sparse: block={self.block} does not divide a weight of shape {sizes}; nearest valid: {near}"
            )
        return near

    def _counts(self, in_shape: Shape, out_shape: Shape) -> tuple[int, list[int]]:
        """Block rows of the matrix, and the numbers of blocks a column can have."""
        p, s = self._block(in_shape, out_shape)
        rows = math.prod(in_shape) // p
        return rows, pattern_counts(self.pattern, rows, math.prod(out_shape) // s)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlockSparse:
        rows, counts = self._counts(in_shape, out_shape)
        self.required("density")
        asked = round(self.density * rows)
        if asked not in counts:
            near = sorted(sorted(counts, key=lambda k: abs(k - self.density * rows))[:3])
            raise StructureError(
                f"block_sparse: density={self.density} asks for {asked} of the {rows} blocks of a column, which "
                f"pattern={self.pattern!r} does not have; nearest densities: {', '.join(f'{k / rows:.6g}' for k in near)}"
            )
        return BoundBlockSparse(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.density is not None:
            return []
        rows, counts = self._counts(in_shape, out_shape)
        return [dataclasses.replace(self, density=k / rows) for k in counts]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlockSparse(Bound):
    """Block sparse with sizes: leaves `values` (block columns, k, p, s) and the frozen int32 `rows` (block columns, k).

    rows[c, j] is the block row of values[c, j], ascending in each column. Static patterns store it too, so that a kernel
    reads one layout.
    """

    grams: ClassVar[str] = "diagonal"
    splits: ClassVar[tuple[str, ...]] = ("out",)
    last: ClassVar[str] = "values"

    @property
    def exact(self) -> bool:
        """The optimum of the class, but with `random` only for the support."""
        return self.structure.pattern != "random"

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(block rows, block columns, p, s)."""
        p, s = self.structure._block(self.in_shape, self.out_shape)
        return self.d_in // p, self.d_out // s, p, s

    @property
    def count(self) -> int:
        """Blocks per block column."""
        return round(self.structure.density * self.grid[0])

    def _rows_leaf(self, out_axes: Axes) -> Leaf:
        shape, axes = (self.grid[1], self.count), (first_axis(out_axes), None)
        return Leaf(shape, axes, 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        rows, columns, p, s = self.grid
        shape, axes = (columns, self.count, p, s), (first_axis(out_axes), None, "block_in", "block_out")
        reach = max(1, round(self.d_out * self.count / rows))
        return {"values": self.factor(shape, axes, self.count * p, reach, share=1), "rows": self._rows_leaf(out_axes)}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        return self._support(None, key) if name == "rows" else super()._sample(name, leaf, key, dtype)

    def _support(self, blocks: jax.Array | None, key: jax.Array) -> jax.Array:
        """Block rows (block columns, k): those of the pattern, by magnitude where `blocks` are given, else drawn."""
        rows, columns, _, _ = self.grid
        if self.structure.pattern in ("butterfly", "banded"):
            return jnp.asarray(static_rows(self.structure.pattern, rows, columns, self.count))
        if self.structure.pattern == "magnitude" and blocks is not None:
            power = jnp.sum(jnp.square(blocks), axis=(2, 3))
            return jnp.sort(lax.top_k(power, self.count)[1], axis=1).astype(jnp.int32)
        return draw_rows(key, columns, rows, self.count)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return block_sparse(x, params["values"], params["rows"])

    def materialize(self, params: Params) -> jax.Array:
        rows, columns, p, s = self.grid
        empty = jnp.zeros((columns, rows, p, s), params["values"].dtype)
        at = jnp.arange(columns)[:, None], params["rows"]
        dense = empty.at[at].add(params["values"], unique_indices=True, indices_are_sorted=True)
        return dense.transpose(1, 2, 0, 3).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """Rows without the matrix: per block column the one block, if any, that holds the row."""
        columns, p = self.grid[1:3]
        here = params["rows"] == (ids // p)[..., None, None]
        rows = params["values"][jnp.arange(columns), jnp.argmax(here, axis=-1), (ids % p)[..., None]]
        return jnp.where(jnp.any(here, axis=-1)[..., None], rows, 0).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The blocks of w on the support: optimal for it, with any diagonal grams.

        butterfly and banded have one support; magnitude takes the best one, per block column the k blocks of largest
        (weighted) Frobenius norm, ties to the lower row; random draws it from `key` or keeps that of `like`.

        Raises:
          StructureError: a full gram, or `random` without `key` and `like`.
        """
        self.check_dense(w)
        roots = [
            None if gram is None else diagonal_roots(gram, size, what, self.structure.name)[0]
            for gram, size, what in ((in_gram, self.d_in, "in_gram"), (out_gram, self.d_out, "out_gram"))
        ]
        if self.structure.pattern == "random" and like is not None:
            rows = like["rows"]
        elif self.structure.pattern == "random" and key is None:
            raise StructureError(
                "block_sparse: pattern='random' draws its support, so project needs key=jax.random.key(...) or like=...; "
                "pattern='magnitude' takes the largest blocks"
            )
        else:
            rows = self._support(self._blocks(scale_columns(scale_rows(roots[0], _modulus(w)), roots[1])), key)
        return {"values": self._blocks(w)[jnp.arange(self.grid[1])[:, None], rows], "rows": rows}

    def _blocks(self, w: jax.Array) -> jax.Array:
        """(block columns, block rows, p, s) of a matrix."""
        rows, columns, p, s = self.grid
        return w.reshape(rows, p, columns, s).transpose(2, 0, 1, 3)

    def mask_leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """What `masked` stores beside the weights: the support when it is random, else nothing."""
        return {"rows": self._rows_leaf(out_axes)} if self.structure.pattern == "random" else {}

    def mask(self, w: jax.Array, stored: Params) -> jax.Array:
        """Boolean (d_in, d_out): the stored support, the pattern's, or the k largest blocks of each column of w."""
        rows, columns, p, s = self.grid
        at = stored["rows"] if "rows" in stored else self._support(self._blocks(_modulus(w)), None)
        kept = jnp.zeros((columns, rows), bool).at[jnp.arange(columns)[:, None], at].set(True)
        return jnp.broadcast_to(kept.T[:, None, :, None], (rows, p, columns, s)).reshape(self.d_in, self.d_out)

    def _flops(self, rows: int) -> int:
        _, columns, p, s = self.grid
        return 2 * rows * columns * self.count * p * s

    def _materialize_flops(self) -> int:
        return 0


def _modulus(w: jax.Array) -> jax.Array:
    return jnp.abs(w.astype(working_dtype(w)))
