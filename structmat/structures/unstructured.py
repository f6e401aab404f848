"""A support anywhere in the matrix, for `masked`: the only pattern a method of training may move."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, scale_columns, scale_rows
from structmat.structures.recipe import Structure
from structmat.structures.selection import MOST, highest, largest

EXAMPLE = "masked(dense(), unstructured(density=0.1), rule='plain')"


@dataclasses.dataclass(frozen=True, repr=False)
class Unstructured(Composite):
    """`unstructured(density)`: exactly round(density n m) entries, wherever they are; a pattern of `masked`.

    The support is kept, as a bool mask of the shape of the matrix: drawn at random by init, by magnitude by `project`.
    `rescale=True` starts the weights 1/sqrt(density) larger, so that outputs have the size a dense layer's have.
    """

    density: float | None = None
    rescale: bool = False
    name: ClassVar[str] = "unstructured"

    def check(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise StructureError(f"unstructured: density must be in (0, 1], got {self.density}")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundUnstructured:
        self.required("density")
        size = math.prod(in_shape) * math.prod(out_shape)
        if size > MOST:
            raise StructureError(f"unstructured: a weight of {size} entries is too large; at most {MOST}")
        if round(self.density * size) < 1:
            raise StructureError(
                f"unstructured: density={self.density} leaves no entry of {size}; smallest density is {1 / size:.6g}"
            )
        return BoundUnstructured(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """In steps of one entry per column."""
        if self.density is not None:
            return []
        d_in = math.prod(in_shape)
        return [dataclasses.replace(self, density=k / d_in) for k in range(1, d_in + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundUnstructured(Bound):
    """Unstructured with sizes: what `masked` asks of a pattern, and the frozen bool leaf `mask` (d_in, d_out)."""

    grams: ClassVar[str] = "diagonal"

    @property
    def count(self) -> int:
        """Entries of the support."""
        return round(self.structure.density * self.d_in * self.d_out)

    @property
    def gain(self) -> float:
        """Factor on the initial weights."""
        return (self.count / (self.d_in * self.d_out)) ** -0.5 if self.structure.rescale else 1.0

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        raise StructureError(f"unstructured is a pattern and holds no weights; write {EXAMPLE}")

    def mask_leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """What `masked` stores beside the weights."""
        axes = (first_axis(in_axes), first_axis(out_axes))
        shape = (self.d_in, self.d_out)
        return {"mask": Leaf(shape, axes, 1, 1, 1.0, law="index", dtype=jnp.bool_, trainable=False, decay=False)}

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        rank = jax.random.bits(key, leaf.shape, jnp.uint32) >> 1
        return highest(rank, jnp.ones(leaf.shape, bool), self.count)

    def mask(self, w: jax.Array, stored: Params) -> jax.Array:
        """Boolean (d_in, d_out), as stored."""
        return stored["mask"]

    def materialize(self, params: Params) -> jax.Array:
        return params["values"]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The optimum: the largest |w|, weighted by the roots of diagonal grams; ties go to the lower position."""
        self.check_dense(w)
        roots = [
            None if gram is None else diagonal_roots(gram, size, what, self.structure.name)[0]
            for gram, size, what in ((in_gram, self.d_in, "in_gram"), (out_gram, self.d_out, "out_gram"))
        ]
        score = scale_columns(scale_rows(roots[0], jnp.abs(w)), roots[1])
        mask = largest(score, jnp.ones(w.shape, bool), self.count)
        return {"values": jnp.where(mask, w, 0), "mask": mask}

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.count
