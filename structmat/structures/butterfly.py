"""Butterfly matrices (Dao et al. 2019, "Learning fast algorithms for linear transforms using butterfly factorizations").

W is a product of log2(n) sparse stages of 2x2 blocks: the class of the fast Fourier transform, all of whose block
entries are free. `butterfly_transforms` builds the exact transforms.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound, rows_of
from structmat.structures.butterfly_projection import nearest_passes
from structmat.structures.butterfly_stages import (
    Passes,
    dense,
    merge_flops,
    multiply,
    multiply_flops,
    rows_of_pass,
    scale_side,
    strides,
    transposed,
)
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape
from structmat.structures.linalg import diagonal_roots, scale_columns, scale_rows
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Butterfly(Structure):
    """`butterfly(increasing=True, depth=None, field='real')`: d_in = d_out = n, a power of two, at least 2.

    Args:
      increasing: strides of the first pass run 1, 2, ..., n/2; else n/2, ..., 2, 1.
      depth: number of passes, every second one with its strides in the other order (the kaleidoscope of Dao et al.
        2020); left out it is one, or what `fit` chooses. Parameters 2 n log2(n) depth, twice that when complex.
      field: whether the blocks are real or complex.

    Blocks start with independent normal entries of variance 1/2, which keeps E[y^2] = E[x^2]; `paper` is the authors'
    `ortho`: random orthogonal (unitary) blocks, so that W starts orthogonal.
    """

    increasing: bool = True
    depth: int | None = None
    field: Literal["real", "complex"] = "real"
    name: ClassVar[str] = "butterfly"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="butterfly()",
        formula="∏ₖ Bₖ, Bₖ = 2×2 blocks at stride 2ᵏ",
        params="2n log₂ n · depth",
        flops="2n log₂ n · depth (1 row), radix-16 GEMMs: 8n log₂ n · depth",
        nearest="within √(log₂ n - 1), then monotone (1 pass); heuristic, monotone (more)",
        sharding="whole on every device",
        paper="Dao et al. 2019, 2020; Le et al. 2022",
        when="learned fast transforms, very small square layers",
    )

    def check(self) -> None:
        self.need(depth=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundButterfly:
        self._stages(in_shape, out_shape)
        return BoundButterfly(dataclasses.replace(self, depth=self.depth or 1), in_shape, out_shape)

    def _stages(self, in_shape: Shape, out_shape: Shape) -> int:
        n, m = math.prod(in_shape), math.prod(out_shape)
        if n != m:
            raise StructureError(
                f"butterfly: needs a square weight, got ({n}, {m}); put it beside one that changes the size, as in "
                f"butterfly() @ monarch(blocks=4)"
            )
        if n < 2 or n & (n - 1):
            low = max(2, 1 << (n.bit_length() - 1))
            raise StructureError(
                f"butterfly: d_in={n} is not a power of two; nearest sizes that work: {low}, {2 * low}; any size splits "
                f"with block_tensor_train(rank=1, cores=3)"
            )
        return n.bit_length() - 1

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.depth is not None:
            return []
        stages = self._stages(in_shape, out_shape)
        most = max(1, 2**stages // (2 * stages))
        return [dataclasses.replace(self, depth=d) for d in range(1, most + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundButterfly(Bound):
    """Butterfly with sizes. Leaves `stage0`, `stage1`, ... (2, 2, n/2) in order of application: [in bit, out bit, pair]."""

    exact: ClassVar[bool] = False
    grams: ClassVar[str] = "diagonal"

    @property
    def stages(self) -> int:
        """Stages of one pass, log2(n)."""
        return self.d_in.bit_length() - 1

    @property
    def last(self) -> str:
        """The stage applied last."""
        return f"stage{self.stages * self.structure.depth - 1}"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        count = self.stages * self.structure.depth
        special = {"std": 0.5**0.5, "law": "orthogonal"} if self.structure.init == "paper" else {}
        if self.structure.field == "complex":
            special["dtype"] = jnp.complex64
        first = lambda k: 1 if k < self.stages else 2
        shape, axes = (2, 2, self.d_in // 2), (None, None, None)
        return {
            f"stage{k}": self.factor(shape, axes, 2, 2, share=count, embed_fan=first(k), **special)
            for k in range(count)
        }

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if leaf.law != "orthogonal":
            return super()._sample(name, leaf, key, dtype)
        return _orthogonal_blocks(key, self.d_in // 2, leaf.dtype or dtype) * (leaf.std * 2**0.5)

    def _passes(self, params: Params) -> Passes:
        s = self.stages
        return [[params[f"stage{p * s + k}"] for k in range(s)] for p in range(self.structure.depth)]

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        y = multiply(self._passes(params), x.reshape(rows_of(x), self.d_in), self.structure.increasing)
        return y.reshape(*x.shape[:-1], self.d_out)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        passes = [transposed(p) for p in reversed(self._passes(params))]
        last_increasing = self.structure.increasing ^ (self.structure.depth % 2 == 0)
        x = multiply(passes, y.reshape(rows_of(y), self.d_out), not last_increasing)
        return x.reshape(*y.shape[:-1], self.d_in)

    def materialize(self, params: Params) -> jax.Array:
        return dense(self._passes(params), self.structure.increasing)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        first, *rest = self._passes(params)
        rows = rows_of_pass(first, ids.reshape(-1), self.structure.increasing)
        return multiply(rest, rows, not self.structure.increasing).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Hierarchical SVDs, then monotone least squares, stage by stage (`butterfly_projection`).

        One pass: exact for members, at most sqrt(log2(n) - 1) times the smallest error. More passes: from there down,
        without a guarantee but never worse than one pass or `like`. Diagonal grams are absorbed by the outer stages.
        """
        self.check_dense(w)
        left, left_inverse = self._roots(in_gram, self.d_in, "in_gram")
        right, right_inverse = self._roots(out_gram, self.d_out, "out_gram")
        wide = jnp.promote_types(w.dtype, jnp.complex64 if self.structure.field == "complex" else jnp.float32)
        target = scale_columns(scale_rows(left, w.astype(wide)), right)
        start = None if like is None else self._scaled(self._passes(like), left, right)
        passes = nearest_passes(target, self.structure.depth, self.structure.increasing, start)
        kept = wide if self.structure.field == "complex" else w.dtype
        flat = [t.astype(kept) for p in self._scaled(passes, left_inverse, right_inverse) for t in p]
        return {f"stage{k}": t for k, t in enumerate(flat)}

    def _roots(self, gram: jax.Array | None, size: int, what: str) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
        return (None, None) if gram is None else diagonal_roots(gram, size, what, self.structure.name)

    def _scaled(self, passes: Passes, left: jax.Array | None, right: jax.Array | None) -> Passes:
        """diag(left) W diag(right), by the first and the last stage."""
        flat = [t for p in passes for t in p]
        up, last_up = self.structure.increasing, self.structure.increasing ^ (self.structure.depth % 2 == 0)
        if left is not None:
            flat[0] = scale_side(flat[0], strides(self.stages, up)[0], left, 0)
        if right is not None:
            flat[-1] = scale_side(flat[-1], strides(self.stages, last_up)[-1], right, 1)
        return [flat[k : k + self.stages] for k in range(0, len(flat), self.stages)]

    def _flops(self, rows: int) -> int:
        return multiply_flops(rows, self.stages, self.structure.depth)

    def _materialize_flops(self) -> int:
        rest = multiply_flops(self.d_in, self.stages, self.structure.depth - 1)
        return merge_flops(self.d_in, self.stages) + rest


def _orthogonal_blocks(key: jax.Array, count: int, dtype: Any) -> jax.Array:
    """(2, 2, count) Haar distributed orthogonal or unitary blocks [[a, b], [-p b*, p a*]], |a|^2 + |b|^2 = |p| = 1."""
    draw = jax.random.normal(key, (3, count), jnp.promote_types(dtype, jnp.float32))
    a, b = draw[:2] / jnp.linalg.norm(draw[:2], axis=0)
    p = jnp.sign(draw[2])
    return jnp.array([[a, b], [-p * b.conj(), p * a.conj()]]).astype(dtype)
