"""Dictionary: W = D Z with a dense dictionary D and a sparse code Z, the same number of entries in every column.

Low rank puts all columns into one subspace; here each column picks its own few atoms, a union of subspaces (CoSpaDi,
arXiv 2509.22075; COMPOT, arXiv 2602.15200; ROCKET, arXiv 2602.11008).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound, rows_of
from structmat.structures.descent import keep_better
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import (
    diagonal_roots,
    gram_roots,
    jit_projection,
    scale_columns,
    scale_rows,
    working_dtype,
)
from structmat.structures.random_sparse import draw_rows
from structmat.structures.recipe import Structure
from structmat.structures.sparse_coding import (
    better,
    dense_code,
    fit_of,
    ksvd_rounds,
    orthonormal_rounds,
    refit,
    search,
    spectral_start,
    tries,
)
from structmat.structures.sparse_products import gather_product, scatter_product

RATIO = 2
"""atoms / nonzeros of the members `fit` considers when both are free: the default of CoSpaDi and COMPOT."""


@dataclasses.dataclass(frozen=True, repr=False)
class Dictionary(Structure):
    """`dictionary(atoms, nonzeros)`: D (d_in, atoms) dense, Z (atoms, d_out) with `nonzeros` entries in each column.

    Parameters atoms d_in + nonzeros d_out, and as many int32 indices as the code has values. More atoms than d_in
    (overcomplete) are allowed; more than d_out could hold every column as it is. `fit` with both arguments left out
    keeps atoms = 2 nonzeros, with one it varies the other.
    """

    atoms: int | None = None
    nonzeros: int | None = None
    name: ClassVar[str] = "dictionary"
    about: ClassVar[About] = About(
        example="dictionary(atoms=16, nonzeros=8)",
        formula="D Z, Z with s entries per column",
        params="k n + s m, and s m int32",
        flops="2 (k n + s m)",
        nearest="heuristic: K-SVD, monotone; full in_gram, diagonal out_gram",
        sharding="over m, D whole; no communication column-parallel",
        paper="CoSpaDi 2025, COMPOT 2026",
        when="columns in a union of subspaces: compression",
    )

    def check(self) -> None:
        self.need(atoms=1, nonzeros=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundDictionary:
        self.required("atoms", "nonzeros")
        self.choose("atoms", range(1, math.prod(out_shape) + 1), in_shape, out_shape)
        self.choose("nonzeros", range(1, min(self.atoms, math.prod(in_shape)) + 1), in_shape, out_shape)
        return BoundDictionary(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        d_in, d_out = math.prod(in_shape), math.prod(out_shape)
        if self.atoms is not None and self.nonzeros is not None:
            return []
        if self.atoms is not None:
            pairs = [(self.atoms, s) for s in range(1, min(self.atoms, d_in) + 1)]
        elif self.nonzeros is not None:
            pairs = [(k, self.nonzeros) for k in range(self.nonzeros, d_out + 1)]
        else:
            pairs = [(RATIO * s, s) for s in range(1, min(d_in, d_out // RATIO) + 1)]
        return [dataclasses.replace(self, atoms=k, nonzeros=s) for k, s in pairs]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundDictionary(Bound):
    """Dictionary with sizes. Leaves `dictionary` (d_in, atoms), `values` (d_out, s) and the frozen int32 `rows` (d_out,
    s), ascending per column."""

    last: ClassVar[str] = "values"
    exact: ClassVar[bool] = False
    grams: ClassVar[str] = "diagonal"

    @property
    def _sizes(self) -> tuple[int, int]:
        """(atoms, nonzeros)."""
        return self.structure.atoms, self.structure.nonzeros

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        k, s = self._sizes
        axes = (first_axis(out_axes), None)
        reach = max(1, round(self.d_out * s / k))
        return {
            "dictionary": self.factor((self.d_in, k), (first_axis(in_axes), "rank"), self.d_in, k, share=2),
            "values": self.factor((self.d_out, s), axes, s, reach, share=2, embed_fan=s),
            "rows": Leaf((self.d_out, s), axes, 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False),
        }

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if name == "rows":
            return draw_rows(key, self.d_out, *self._sizes)
        return super()._sample(name, leaf, key, dtype)

    def _decode(self, params: Params, h: jax.Array) -> jax.Array:
        """h (..., atoms) -> h @ Z (..., d_out)."""
        y = gather_product(h.reshape(rows_of(h), -1), params["values"], params["rows"])
        return y.reshape(*h.shape[:-1], self.d_out)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self._decode(params, x @ params["dictionary"])

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        flat = y.reshape(rows_of(y), self.d_out)
        h = scatter_product(flat, params["values"], params["rows"], self.structure.atoms)
        return h.reshape(*y.shape[:-1], -1) @ params["dictionary"].T

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return self._decode(params, jnp.take(params["dictionary"], ids, axis=0))

    def materialize(self, params: Params) -> jax.Array:
        return params["dictionary"] @ dense_code((params["values"], params["rows"]), self.structure.atoms)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """K-SVD with orthogonal matching pursuit, from the best of `like` and the spectral start, and below 2^18 entries
        from random columns of w too (`search`; `key` draws them, a fixed one if left out).

        The start is the truncated SVD with its coefficients thresholded, improved by COMPOT's alternation where atoms
        <= d_in, and completed by columns of w where atoms > d_in. Every step is kept only if it lowers the error, so
        the result is no worse than `like`, nor than the thresholded SVD, and for nonzeros = atoms it is the best matrix
        of that rank; otherwise no optimum is proven (the problem is NP-hard).

        Grams are exact changes of variables: D is free, so any in_gram acts on it by its root, and a diagonal out_gram
        scales columns, which are coded one by one. Atoms have unit norm in the weighted space, their largest entry
        positive.

        Raises:
          StructureError: a full out_gram, or a complex matrix.
        """
        self.check_dense(w)
        if jnp.iscomplexobj(w):
            raise StructureError("dictionary: cannot project a complex matrix; project its real and imaginary parts")
        left = None if in_gram is None else gram_roots(in_gram, self.d_in, "in_gram")[0]
        right = None
        if out_gram is not None:
            right = diagonal_roots(out_gram, self.d_out, "out_gram", self.structure.name)[0]
            right = jnp.maximum(right, jnp.finfo(right.dtype).eps * jnp.max(right))  # columns not seen follow w
        key = jax.random.key(0) if key is None else key
        new = _solve(w, left, right, like, key, *self._sizes)
        return keep_better(self, w, new, like, in_gram, out_gram)

    def _flops(self, rows: int) -> int:
        k, s = self._sizes
        return 2 * rows * (self.d_in * k + self.d_out * s)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.structure.atoms * self.d_out


@jit_projection(5, 6)
def _solve(
    w: jax.Array,
    left: jax.Array | None,
    right: jax.Array | None,
    like: Params | None,
    key: jax.Array,
    k: int,
    count: int,
) -> dict[str, jax.Array]:
    """Parameters for |left (w - M) right|, from `like` or the better start."""
    wide = w.astype(working_dtype(w))
    t = scale_columns(scale_rows(left, wide), right)
    spectral = fit = spectral_start(t, k, count)
    old = fit
    if like is not None:
        values = like["values"].astype(t.dtype)
        code = values if right is None else values * right[:, None], like["rows"]
        old = fit_of(t, scale_rows(left, like["dictionary"].astype(t.dtype)), code)
    if k <= t.shape[0] and count < k:
        fit = orthonormal_rounds(t, fit, fit.error <= old.error)
    fit = better(old, fit)
    starts = tries(t.size) if count < k else 0
    fit = search(t, [fit, spectral], key, starts) if starts else ksvd_rounds(t, fit)
    z = dense_code(fit.code, k)
    if left is None:
        d, (values, rows), _ = better(fit_of(t, refit(t, z), fit.code), fit)
    else:
        # The least-squares dictionary of the code, which no gram enters: it loses nothing to their condition.
        d, (values, rows) = refit(scale_columns(wide, right), z), fit.code
        norms = jnp.linalg.norm(scale_rows(left, d), axis=0)
        d, values = jnp.where(norms > 0, d / jnp.where(norms > 0, norms, 1), d), values * norms[rows]
    peak = jnp.take_along_axis(d, jnp.argmax(jnp.abs(d), axis=0, keepdims=True), axis=0)
    sign = jnp.where(peak < 0, -1, 1).astype(d.dtype)
    values = values * sign[0, rows]
    if right is not None:
        values = jnp.where(right[:, None] > 0, values / jnp.where(right > 0, right, 1)[:, None], 0)
    return {"dictionary": (d * sign).astype(w.dtype), "values": values.astype(w.dtype), "rows": rows}
