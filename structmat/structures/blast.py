"""BLAST, block-level adaptive structured matrices (Lee et al. 2024, arXiv 2410.21262): block (k, l) of W is
U_k diag(s_kl) V_l, with the left factor shared along a block row, the right one along a block column.

b = 1 is low rank, s = 1 low rank over all blocks, s_kl = 0 for k != l block diagonal with blocks of rank r.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import balanced_split, diagonal_roots, working_dtype
from structmat.structures.recipe import Structure

SWEEPS = 100
"""Alternating sweeps of a projection at most; it stops earlier when a sweep no longer lowers the error."""
RELAX = 1.9
"""Over-relaxation of the first sweep, falling linearly to 1; any value below 2 is monotone."""
DAMPING = 0.03
"""Part of the mean curvature, times the relative error, that damps each solve; any value is monotone."""


@dataclasses.dataclass(frozen=True, repr=False)
class Blast(Structure):
    """`blast(blocks, rank)`: blocks x blocks blocks; parameters rank (d_in + d_out + blocks^2)."""

    blocks: int | None = None
    rank: int | None = None
    name: ClassVar[str] = "blast"
    about: ClassVar[About] = About(
        example="blast(blocks=4, rank=8)",
        formula="W[k,l] = Uₖ diag(s[:,k,l]) Vₗ",
        params="r (n + m + b²)",
        flops="2 r (n + m + b²)",
        nearest="heuristic: alternating least squares from the SVD, monotone; diagonal grams",
        sharding="blocks of both sides",
        paper="Lee et al. 2024",
        when="compression: low rank with a coupling per block",
    )

    def check(self) -> None:
        self.need(blocks=1, rank=1)

    def _ranks(self, in_shape: Shape, out_shape: Shape) -> list[int]:
        self.required("blocks")
        n, m = math.prod(in_shape), math.prod(out_shape)
        self.choose("blocks", divisors(math.gcd(n, m)), in_shape, out_shape)
        return list(range(1, min(n, m) + 1))

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlast:
        ranks = self._ranks(in_shape, out_shape)
        self.required("rank")
        self.choose("rank", ranks, in_shape, out_shape)
        return BoundBlast(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        return [dataclasses.replace(self, rank=r) for r in self._ranks(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlast(Bound):
    """BLAST with sizes. Leaves `u` (b, d_in/b, r), `s` (r, b, b) from in block to out block, `v` (b, r, d_out/b)."""

    last: ClassVar[str] = "v"
    exact: ClassVar[bool] = False
    grams: ClassVar[str] = "diagonal"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(b, d_in/b, d_out/b, r)."""
        b = self.structure.blocks
        return b, self.d_in // b, self.d_out // b, self.structure.rank

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        b, p, q, r = self.sizes
        i, o = first_axis(in_axes), first_axis(out_axes)
        return {
            "u": self.factor((b, p, r), (i, "block_in", "rank"), p, r, share=3),
            "s": self.factor((r, b, b), ("rank", i, o), b, b, share=3),
            "v": self.factor((b, r, q), (o, "rank", "block_out"), r, q, share=3, embed_fan=r),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        b, p, _, _ = self.sizes
        z = x.reshape(-1, b, p).swapaxes(0, 1) @ params["u"]
        z = z.transpose(2, 1, 0) @ params["s"]
        y = z.transpose(2, 1, 0) @ params["v"]
        return y.swapaxes(0, 1).reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        left = params["u"][:, None] * params["s"].transpose(1, 2, 0)[:, :, None]
        return jnp.einsum("klpr,lrq->kplq", left, params["v"]).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        _, p, _, r = self.sizes
        rows = params["u"].reshape(self.d_in, r)[ids][..., None, :]
        rows = rows * params["s"].transpose(1, 2, 0)[ids // p]
        return jnp.einsum("...lr,lrq->...lq", rows, params["v"]).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Over-relaxed alternating least squares: every sweep solves for u, v and s in closed form and lowers the error.

        Starts from `like` if given, else from the truncated SVD with s = 1, so the result is never worse than `like`
        or than low rank of equal rank. With `key` and no `like` a second, random start runs and the better one is
        returned. The result is a local optimum. A diagonal gram scales rows or columns and keeps the class.

        Raises:
          StructureError: wrong shape or a full gram.
        """
        self.check_dense(w)
        b, p, q, r = self.sizes
        rows, rows_back = self._roots(in_gram, self.d_in, "in_gram", (b, p, 1))
        columns, columns_back = self._roots(out_gram, self.d_out, "out_gram", (b, 1, q))
        t = w.astype(working_dtype(w)).reshape(b, p, b, q).transpose(0, 2, 1, 3) * rows[:, None] * columns
        if like is not None:
            cast = {name: value.astype(t.dtype) for name, value in like.items()}
            starts = [(cast["u"] * rows, cast["s"], cast["v"] * columns)]
        else:
            starts = [_from_svd(t, r)] + ([] if key is None else [_from_noise(key, t, r)])
        results = [_descend(t, *start) for start in starts]
        found = functools.reduce(_better, results)[:3]
        u, s, v = _balanced(*found)
        new = {"u": u * rows_back, "s": s, "v": v * columns_back}
        return {name: value.astype(w.dtype) for name, value in new.items()}

    def _roots(self, gram: jax.Array | None, size: int, what: str, shape: Shape) -> tuple[jax.Array, jax.Array]:
        if gram is None:
            return jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))
        root, inverse = diagonal_roots(gram, size, what, self.structure.name)
        return root.reshape(shape), inverse.reshape(shape)

    def _flops(self, rows: int) -> int:
        b, _, _, r = self.sizes
        return 2 * rows * r * (self.d_in + self.d_out + b * b)

    def _materialize_flops(self) -> int:
        b, _, _, r = self.sizes
        return b * self.d_in * r + 2 * self.d_in * self.d_out * r


def _from_svd(t: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Low rank with every coupling 1; t (b, b, p, q)."""
    b, _, p, q = t.shape
    left, right = balanced_split(t.transpose(0, 2, 1, 3).reshape(b * p, b * q), rank)
    return left.reshape(b, p, rank), jnp.ones((rank, b, b), t.dtype), right.reshape(rank, b, q).swapaxes(0, 1)


def _from_noise(key: jax.Array, t: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normal factors whose matrix has the size of t."""
    b, _, p, q = t.shape
    std = (jnp.mean(t**2) / rank) ** 0.25
    keys, shapes = jax.random.split(key, 3), ((b, p, rank), (rank, b, b), (b, rank, q))
    u, s, v = (jax.random.normal(k, shape, t.dtype) for k, shape in zip(keys, shapes))
    return std * u, s, std * v


def _error(t: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.linalg.norm(t - jnp.einsum("kpr,rkl,lrq->klpq", u, s, v))


@jax.jit
def _descend(t: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """(u, s, v, error) after up to SWEEPS sweeps; a sweep that does not lower the error is dropped and ends the descent."""
    size = jnp.linalg.norm(t)

    def sweep(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, _, u, s, v, error = carry
        relax = 1 + (RELAX - 1) * (1 - count / SWEEPS)
        move = functools.partial(_step, relax=relax, damping=DAMPING * error / size)
        new = _sweep(t, u, s, v, move)
        new_error = _error(t, *new)
        better = new_error < error
        u, s, v = (jnp.where(better, fresh, old) for fresh, old in zip(new, (u, s, v)))
        return count + 1, better, u, s, v, jnp.where(better, new_error, error)

    enough = 4 * jnp.finfo(t.dtype).eps * size
    going = lambda carry: (carry[0] < SWEEPS) & carry[1] & (carry[-1] > enough)
    start = (jnp.zeros((), jnp.int32), jnp.array(True), u, s, v, _error(t, u, s, v))
    return lax.while_loop(going, sweep, start)[2:]


def _sweep(t: jax.Array, u: jax.Array, s: jax.Array, v: jax.Array, move: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step each on u, v and s; each is a least squares problem whose normal equations split over the blocks."""
    c = s.transpose(1, 2, 0)
    vv = v @ v.mT
    h = jnp.einsum("klr,klt,lrt->krt", c, c, vv)
    u = move(h, u.mT, jnp.einsum("klpq,lrq,klr->krp", t, v, c)).mT

    uu, ut = u.mT @ u, jnp.einsum("kpr,klpq->klrq", u, t)
    h = jnp.einsum("klr,klt,krt->lrt", c, c, uu)
    v = move(h, v, jnp.einsum("klr,klrq->lrq", c, ut))

    h = uu[:, None] * (v @ v.mT)
    c = move(h, c[..., None], jnp.einsum("klrq,lrq->klr", ut, v)[..., None])[..., 0]
    return u, c.transpose(2, 0, 1), v


def _step(h: jax.Array, x: jax.Array, right: jax.Array, relax: jax.Array, damping: jax.Array) -> jax.Array:
    """x moved by `relax` times the damped Newton step towards h x = right; h (..., r, r) is positive semidefinite.

    The step's operator is at most the identity, so relax < 2 never raises the quadratic; a singular h is lifted by a
    rounding error's worth of its trace.
    """
    rank = h.shape[-1]
    mean = jnp.trace(h, axis1=-2, axis2=-1)[..., None, None] / rank
    lift = jnp.where(mean > 0, mean, 1) * (damping + 4 * rank * jnp.finfo(h.dtype).eps)
    return x + relax * cho_solve(cho_factor(h + lift * jnp.eye(rank, dtype=h.dtype)), right - h @ x)


def _better(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.where(b[-1] < a[-1], y, x) for x, y in zip(a, b))


def _balanced(u: jax.Array, s: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same matrix with couplings of RMS 1, u and v of equal norm per rank index, u's largest entry positive."""
    flat = u.reshape(-1, u.shape[-1])
    norms = (jnp.linalg.norm(flat, axis=0), jnp.sqrt(jnp.mean(s**2, axis=(1, 2))), jnp.linalg.norm(v, axis=(0, 2)))
    dead = (norms[0] == 0) | (norms[1] == 0) | (norms[2] == 0)
    left, middle, right = (jnp.where(dead, 1, n) for n in norms)
    peak = jnp.take_along_axis(flat, jnp.argmax(jnp.abs(flat), axis=0)[None], axis=0)[0]
    sign = jnp.where(peak < 0, -1, 1).astype(u.dtype)
    half = sign * jnp.sqrt(middle)
    u = u * (half * jnp.sqrt(right / left))
    return u, s / middle[:, None, None], v * (half * jnp.sqrt(left / right))[:, None]
