"""Householder: partial isometries of k reflections on each side (Song et al. 2023, "Householder Projector").

W = Q(u)[:, :k] diag(signs) Q(v)[:, :k]^T, where Q(y) = H_1 ... H_k, H_j = I - 2 y_j y_j^T / |y_j|^2. The paper keeps as
many reflections as coordinates on each side and reads k columns; k reflections reach every k columns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import check_gram, scale_columns, scale_rows, truncated_svd, working_dtype
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Householder(Structure):
    """`householder(reflections)`: k <= min(d_in, d_out) singular values are 1, the others 0; k = d_in = d_out is orthogonal.

    Parameters k (d_in + d_out), and k signs that do not train. |x W| <= |x|, and E[y^2] = k / d_out for x of variance
    1, whatever the init: the length of a reflection's vector does not count, only how far a step of a given size turns
    it. W starts uniform (Haar) among the members; with `paper` the vectors are normal with standard deviation 0.05, which
    for few reflections leaves W near a selection of the first k coordinates. No weight decay.
    """

    reflections: int | None = None
    name: ClassVar[str] = "householder"
    about: ClassVar[About] = About(
        example="householder(reflections=16)",
        formula="Q(u)[:, :k] diag(±1) Q(v)[:, :k]ᵀ",
        params="k(n+m)",
        flops="2k(n+m), building it 4k²(n+m)",
        nearest="optimal (SVD), a full gram on a side of which k is the size",
        sharding="u over n, v over m, reduce k",
        paper="Song et al. 2023; Schreiber and Van Loan 1989",
        when="orthogonal or 1-Lipschitz layers, interpretable directions",
    )

    def check(self) -> None:
        self.need(reflections=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundHouseholder:
        self.required("reflections")
        full = min(math.prod(in_shape), math.prod(out_shape))
        self.choose("reflections", range(1, full + 1), in_shape, out_shape)
        return BoundHouseholder(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.reflections is not None:
            return []
        full = min(math.prod(in_shape), math.prod(out_shape))
        return [dataclasses.replace(self, reflections=k) for k in range(1, full + 1)]


def frame(y: jax.Array) -> jax.Array:
    """The first k columns (d, k) of H_1 ... H_k for the columns of y `(d, k)`, k <= d, orthonormal for any of them.

    Compact WY form: H_1 ... H_k = I - Y T Y^T with T^-1 = strict_upper(Y^T Y) + diag(|y_j|^2) / 2 (Schreiber and Van
    Loan 1989; Joffrain et al. 2006). In f32 at least, back in y's dtype. The length of a vector does not matter; a zero
    vector reflects nothing and has a zero gradient.
    """
    k = y.shape[1]
    wide = y.astype(working_dtype(y))
    longest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=0))
    wide = wide / jnp.where(longest > 0, longest, 1)
    products = wide.T @ wide
    halves = jnp.where(products > 0, products, 1) / 2
    inverse = jnp.where(jnp.eye(k, dtype=bool), halves, jnp.triu(products))
    return (jnp.eye(*y.shape, dtype=wide.dtype) - wide @ solve_triangular(inverse, wide[:k].T)).astype(y.dtype)


def frame_flops(d: int, k: int) -> int:
    """FLOPs of `frame`: Y^T Y, k triangular solves of size k, and the product with Y."""
    return 2 * d * k * k + k**3 + 2 * d * k * k


def reflections_of(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors y `(d, k)` and signs `(k,)` with frame(y) * signs = q, for orthonormal columns q `(d, k)`.

    The vectors are those of the Householder QR of q, whose R is diagonal with entries +-1: below the diagonal as
    returned by LAPACK, with the ones on the diagonal that it leaves out.
    """
    packed = jnp.linalg.qr(q, mode="raw")[0].T
    y = jnp.tril(packed, -1) + jnp.eye(*q.shape, dtype=q.dtype)
    return y, jnp.where(jnp.sum(frame(y) * q, axis=0) < 0, -1, 1).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundHouseholder(Bound):
    """Householder with sizes. Leaves `u` (d_in, k), `v` (d_out, k) and the frozen int8 `signs` (k,), +1 or -1."""

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        k, n, m = self.structure.reflections, self.d_in, self.d_out
        paper = self.structure.init == "paper"
        special = {"law": "normal", "std": 0.05} if paper else {"law": "orthogonal"}
        options = {"share": 2, "decay": False, **special}
        return {
            "u": self.factor((n, k), (first_axis(in_axes), "rank"), n, k, **options),
            "signs": Leaf((k,), ("rank",), 1, 1, 1.0, law="index", dtype=jnp.int8, trainable=False, decay=False),
            "v": self.factor((m, k), (first_axis(out_axes), "rank"), m, k, **options),
        }

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if name == "signs":
            # Not `rademacher`, whose draws depend on the 64-bit switch.
            return jnp.where(jax.random.bits(key, leaf.shape, jnp.uint8) & 1, 1, -1).astype(leaf.dtype)
        if leaf.law == "normal":
            return super()._sample(name, leaf, key, dtype)
        q = jnp.linalg.qr(jax.random.normal(key, leaf.shape, jnp.promote_types(dtype, jnp.float32)))[0]
        y = reflections_of(q)[0]
        return (y * (leaf.std * leaf.shape[0] ** 0.5 / jnp.linalg.norm(y, axis=0))).astype(dtype)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return ((x @ frame(params["u"])) * params["signs"]) @ frame(params["v"]).T

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return ((y @ frame(params["v"])) * params["signs"]) @ frame(params["u"]).T

    def materialize(self, params: Params) -> jax.Array:
        return (frame(params["u"]) * params["signs"]) @ frame(params["v"]).T

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return (jnp.take(frame(params["u"]), ids, axis=0) * params["signs"]) @ frame(params["v"]).T

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: U_k V_k^T of the SVD, error^2 = sum_{i<=k} (sigma_i - 1)^2 + sum_{i>k} sigma_i^2.

        With an in_gram A where k = d_in, W W^T = I and the error is a constant less twice trace(W^T A w): the orthogonal
        Procrustes problem, solved by the SVD of A w; likewise an out_gram where k = d_out.

        Raises:
          StructureError: another gram, or both; a complex w.
        """
        self.check_dense(w)
        if jnp.issubdtype(w.dtype, jnp.complexfloating):
            raise StructureError(f"householder: cannot project an array of {w.dtype}; its reflections are real")
        target = self._weighted(w.astype(working_dtype(w)), in_gram, out_gram)
        left, _, right = truncated_svd(target, self.structure.reflections)
        (u, left_signs), (v, right_signs) = reflections_of(left), reflections_of(right.T)
        return {"u": u.astype(w.dtype), "signs": left_signs * right_signs, "v": v.astype(w.dtype)}

    def _weighted(self, w: jax.Array, in_gram: jax.Array | None, out_gram: jax.Array | None) -> jax.Array:
        k = self.structure.reflections
        for what, gram, other, size in (
            ("in_gram", in_gram, out_gram, self.d_in),
            ("out_gram", out_gram, in_gram, self.d_out),
        ):
            if gram is not None:
                check_gram(gram, size, what)
            if gram is not None and (other is not None or k != size):
                raise StructureError(
                    f"householder: no closed form with {what} unless it is the only gram and reflections={size}, "
                    f"got reflections={k}; leave it out"
                )
        return scale_columns(scale_rows(in_gram, w), out_gram)

    def _build_flops(self) -> int:
        k = self.structure.reflections
        return frame_flops(self.d_in, k) + frame_flops(self.d_out, k)

    def _flops(self, rows: int) -> int:
        k = self.structure.reflections
        return self._build_flops() + 2 * rows * k * (self.d_in + self.d_out) + rows * k

    def _materialize_flops(self) -> int:
        k = self.structure.reflections
        return self._build_flops() + self.d_in * k + 2 * self.d_in * k * self.d_out
