"""Sparse Spectral Training's weight: a matrix kept as its singular triplets, of which a few train at a time.

Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025, arXiv
2405.15481. The method that changes which triplets train is `structmat.sparse.sst`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.dense import Dense
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import truncated_svd
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Sst(Structure):
    """`sst(rank)`: W = U diag(s) V^T of full rank m = min(d_in, d_out); s trains, and the vectors of `rank` triplets.

    It starts as the SVD of the dense matrix of the recipe's `init`, the largest triplets first, and stores more than that
    matrix, m (d_in + d_out + 1) numbers; what is small is the optimiser's state, of rank (d_in + d_out) + m of them. The
    vectors that train get the gradients G v_i and G^T u_i by the dense matrix, without the factor s_i of the chain rule,
    so that triplets with s_i = 0 train too; s and the input get the true ones. Alone, without its method, the vectors
    drift from unit length and only the first triplets ever train.
    """

    rank: int | None = None
    name: ClassVar[str] = "sst"

    def check(self) -> None:
        self.need(rank=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundSst:
        self.required("rank")
        full = min(math.prod(in_shape), math.prod(out_shape))
        self.choose("rank", range(1, full + 1), in_shape, out_shape)
        return BoundSst(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundSst(Bound):
    """SST with sizes: leaves `s` (m,), `u` (r, d_in) and `v` (r, d_out) of the first r triplets, and the frozen `u_rest`
    (m - r, d_in) and `v_rest` (m - r, d_out) of the others, which r = m has not."""

    grams: ClassVar[str] = "full"
    last: ClassVar[str] = "s"

    @property
    def full(self) -> int:
        """Triplets in all."""
        return min(self.d_in, self.d_out)

    @property
    def may_densify(self) -> bool:
        """Never unasked: the gradient by the dense matrix would be formed."""
        return False

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """Learning rates: u and v are of unit length in d entries, so each takes the rate of a dense map of fan-in d, by
        which they turn by the same angle on both sides whatever the rank; s is of one size at every width, as learned
        scales are, and takes the plain rate."""
        m, r = self.full, self.structure.rank
        dense = Dense(init=self.structure.init).bind(self.d_in, self.d_out).leaves()["kernel"]
        sizes = {"u": (self.d_in, first_axis(in_axes)), "v": (self.d_out, first_axis(out_axes))}

        def vectors(side: str, count: int, trainable: bool) -> Leaf:
            d, axis = sizes[side]
            own = {"law": "derived", "decay": False, "share": 3, "embed_fan": d, "mode": "paper"}  # no rescaled rows
            return Leaf((count, d), ("rank", axis), d, d, d**-0.5, trainable=trainable, **own)

        rms = dense.std * math.sqrt(max(self.d_in, self.d_out))
        leaves: Leaves = {
            "s": dataclasses.replace(
                dense, shape=(m,), axes=(None,), std=rms, law="derived", decay=False, share=3, fixed_rate=True
            ),
            "u": vectors("u", r, True),
            "v": vectors("v", r, True),
        }
        if r < m:
            leaves |= {"u_rest": vectors("u", m - r, False), "v_rest": vectors("v", m - r, False)}
        return leaves

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        """The SVD of what `dense` draws from this key; a gain acts on s."""
        wide = jnp.promote_types(dtype, jnp.float32)
        w = Dense(init=self.structure.init).bind(self.d_in, self.d_out).init(key, wide)["kernel"]
        return self._from_dense(w, dtype, gain)

    def _from_dense(self, w: jax.Array, dtype: Any, gain: float = 1.0) -> dict[str, Any]:
        u, s, vt = truncated_svd(w, self.full)
        return self.split(u.T.astype(dtype), (gain * s).astype(dtype), vt.astype(dtype))

    def split(self, u: jax.Array, s: jax.Array, v: jax.Array) -> dict[str, Any]:
        """Parameters of all triplets, u (..., m, d_in), s (..., m), v (..., m, d_out), the first r of them to train."""
        r = self.structure.rank
        rest = {"u_rest": u[..., r:, :], "v_rest": v[..., r:, :]} if r < self.full else {}
        return {"s": s, "u": u[..., :r, :], "v": v[..., :r, :]} | rest

    def join(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `split` took: u, s and v of all triplets."""
        if self.structure.rank == self.full:
            return params["u"], params["s"], params["v"]
        both = lambda side: jnp.concatenate([params[side], params[f"{side}_rest"]], axis=-2)
        return both("u"), params["s"], both("v")

    def _sum(self, params: Params, active: jax.Array, rest: Any) -> jax.Array:
        """The part of the triplets that train and, from `rest(s)`, that of the others."""
        r = self.structure.rank
        return active if r == self.full else active + rest(params["s"][r:])

    def _apply(self, params: Params, x: jax.Array, side: str, other: str) -> jax.Array:
        through = _product(x, params[side], params["s"][: self.structure.rank], params[other])
        rest = lambda s: ((x @ params[f"{side}_rest"].T) * s) @ params[f"{other}_rest"]
        return self._sum(params, through, rest)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self._apply(params, x, "u", "v")

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self._apply(params, y, "v", "u")

    def materialize(self, params: Params) -> jax.Array:
        active = _combine(params["u"].T, params["s"][: self.structure.rank], params["v"])
        return self._sum(params, active, lambda s: (params["u_rest"].T * s) @ params["v_rest"])

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        rows = lambda name: jnp.take(params[name].T, ids, axis=0)
        active = _combine(rows("u"), params["s"][: self.structure.rank], params["v"])
        return self._sum(params, active, lambda s: (rows("u_rest") * s) @ params["v_rest"])

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """The matrix itself, as its SVD: exact for any gram."""
        self.check_dense(w)
        return self._from_dense(w, w.dtype)

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.full * (self.d_in + self.d_out) + rows * self.full

    def _materialize_flops(self) -> int:
        return self.d_in * self.full + 2 * self.d_in * self.full * self.d_out


@jax.custom_vjp
def _product(x: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """((x u^T) * s) v for x (..., d_in), whose gradients by u and v are those of s = 1 and never form that of the matrix."""
    return ((x @ u.T) * s) @ v


def _product_forward(x: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    hidden = x @ u.T
    return (hidden * s) @ v, (x, hidden, u, s, v)


def _product_backward(kept: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    x, hidden, u, s, v = kept
    back = dy @ v.T
    by_s, by_v = _common(hidden, dy, back)
    by_u = _outer(back, x)
    return ((back * s) @ u).astype(x.dtype), by_u.astype(u.dtype), by_s.astype(s.dtype), by_v.astype(v.dtype)


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _combine(columns: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    """(columns * s) v for columns (..., r) of U, with the gradients of `_product`."""
    return (columns * s) @ v


def _combine_backward(kept: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    columns, s, v = kept
    back = dy @ v.T
    by_s, by_v = _common(columns, dy, back)
    return back.astype(columns.dtype), by_s.astype(s.dtype), by_v.astype(v.dtype)


_combine.defvjp(lambda columns, s, v: (_combine(columns, s, v), (columns, s, v)), _combine_backward)


def _common(hidden: jax.Array, dy: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients by s (r,), the true one, and by v (r, d_out)."""
    return jnp.sum(hidden * back, axis=tuple(range(hidden.ndim - 1))), _outer(hidden, dy)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """(r, d): the sum over all rows of a (..., r) and b (..., d)."""
    rows = tuple(range(a.ndim - 1))
    return jnp.tensordot(a, b, axes=(rows, rows))
