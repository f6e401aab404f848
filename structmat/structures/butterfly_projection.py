"""Nearest butterfly: stages peeled off one by one, then least squares stage by stage.

Peeling is the hierarchical algorithm of Le, Zheng, Riccietti and Gribonval 2022, "Fast learning of fast transforms, with
guarantees", along the tree that splits off one stage at a time: the two factors of a split meet in one path, so the
split is a rank-one SVD per block, exact for members. What is split off is orthonormal, as in TT-SVD, so that error^2 <=
sum over the splits of the tails of w's own blocks, at most log2(n) - 1 times the smallest error^2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.butterfly_stages import Passes, Twiddles, dense, strides, transposed
from structmat.structures.linalg import truncated_svd

SWEEPS = 20
"""Sweeps over all stages at most; they end when one lowers the error by less than 1e-5 of it."""
STEPS = 8
"""Conjugate gradient steps for one stage at most."""


def nearest_passes(w: jax.Array, depth: int, increasing: bool, like: Passes | None = None) -> Passes:
    """Stages near to w (n, n), never farther than `like`, each of the same Frobenius norm; traceable.

    One pass starts from its peeled stages. More passes start from the better of two: the first pass peeled and the
    rest identity, or the second. `like` is one more start. Then every stage in turn takes the least squares solution
    given the others; a sweep over the stages that does not lower the error is not taken.
    """
    count = w.shape[0].bit_length() - 1
    identity = [jnp.broadcast_to(jnp.eye(2, dtype=w.dtype)[..., None], (2, 2, w.shape[0] // 2))] * count
    starts = [
        [peel(w, increasing ^ (at == 1)) if i == at else identity for i in range(depth)] for at in range(min(depth, 2))
    ]
    if like is not None:
        starts.append([[t.astype(w.dtype) for t in p] for p in like])
    flat = [jnp.stack([t for p in passes for t in p]) for passes in starts]
    split = lambda stages: [list(p) for p in stages.reshape(depth, count, *stages.shape[1:])]
    error = lambda stages: jnp.linalg.norm(w - dense(split(stages), increasing))
    best, least = flat[0], error(flat[0])
    for other in flat[1:]:
        best, least = _better(other, error(other), best, least)

    def sweep(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        done, _, stages, before = carry
        new = _sweep(stages, w, increasing, count)
        stages, after = _better(new, error(new), stages, before)
        return done + 1, before - after > 1e-5 * before, stages, after

    going = lambda carry: (carry[0] < SWEEPS) & carry[1]
    return split(_even(jax.lax.while_loop(going, sweep, (jnp.zeros((), jnp.int32), jnp.array(True), best, least))[2]))


def peel(w: jax.Array, increasing: bool) -> Twiddles:
    """The stages of one pass near to w (n, n); the matrix of a pass is recovered exactly."""
    if not increasing:
        return transposed(peel(w.T, True))
    stages, rest = [], w[None]
    while rest.shape[1] > 2:
        done, size, _ = rest.shape
        # (outputs done, input h, bit; output g, bit) -> for each (done, h, output bit) a matrix (input bit, g) of rank 1
        paths = rest.reshape(done, size // 2, 2, size // 2, 2).transpose(0, 1, 4, 2, 3)
        u, s, vt = truncated_svd(paths, 1)
        stages.append(u[..., 0].transpose(3, 2, 1, 0).reshape(2, 2, -1))
        rest = (s[..., None] * vt)[..., 0, :].transpose(2, 0, 1, 3).reshape(2 * done, size // 2, size // 2)
    return [*stages, rest.transpose(1, 2, 0)]


def _sweep(stages: jax.Array, w: jax.Array, increasing: bool, count: int) -> jax.Array:
    """Every stage (2, 2, n/2) of `stages` in turn as the least squares solution V of L V R = w, R the stages after it.

    The normal equations (L^H L) V (R R^H) = L^H w R^H are wanted on the 2n entries V has, so that one conjugate gradient
    step takes O(n^2); L, L^H L, and for all stages at once w R^H and R R^H, are kept up by one sparse product per stage.
    With one pass the equations are diagonal: diagonals are kept instead of L^H L and R R^H, and a division solves them.
    """
    n, single = w.shape[0], stages.shape[0] == count
    pairs, inverse = (jnp.asarray(t) for t in _tables(n, increasing, count, stages.shape[0]))
    eye = jnp.eye(n, dtype=w.dtype)
    gram = jnp.ones((1, n), jnp.abs(w).dtype) if single else eye
    columns = lambda m, pair: m.T[pair]
    onto = lambda a, b: jnp.einsum("bjm,cjm->bcj", a, b)

    def congruence(gram: jax.Array, t: jax.Array, pair: jax.Array, back: jax.Array) -> jax.Array:
        """V^H gram V, or its diagonal."""
        if single:
            return _times_stage(gram, jnp.abs(t) ** 2, pair, back)
        return _times_stage(_times_stage(gram, t, pair, back).T, t.conj(), pair, back).T

    def backward(carry: tuple[jax.Array, ...], at: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], ...]:
        t, pair, back = at
        adjoint = t.swapaxes(0, 1).conj()
        return (_times_stage(carry[0], adjoint, pair, back), congruence(carry[1], adjoint, pair, back)), carry

    def forward(carry: tuple[jax.Array, ...], at: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        left, ll = carry
        t, pair, back, wr, rr = at
        diagonal = lambda g: g[0][pair] if single else jnp.real(jnp.diagonal(g))[pair]
        scale = diagonal(ll)[:, None] * diagonal(rr)
        invert = lambda v: jnp.where(scale > 0, v / jnp.where(scale > 0, scale, 1), 0)
        wanted = onto(columns(left, pair).conj(), columns(wr, pair))
        if single:
            t = jnp.where(scale > 0, invert(wanted), t)
        else:
            apply = lambda v: onto(_times_stage(ll, v, pair, back)[pair], columns(rr, pair))
            t = jax.scipy.sparse.linalg.cg(apply, wanted, x0=t, tol=1e-6, maxiter=STEPS, M=invert)[0]
        return (_times_stage(left, t, pair, back), congruence(ll, t, pair, back)), t

    _, (wr, rr) = jax.lax.scan(backward, (w, gram), (stages, pairs, inverse), reverse=True)
    return jax.lax.scan(forward, (eye, gram), (stages, pairs, inverse, wr, rr))[1]


def _times_stage(x: jax.Array, t: jax.Array, pair: jax.Array, back: jax.Array) -> jax.Array:
    """x (r, n) times a stage whose stride is data: `pair` (2, n/2) coordinates, `back` (n,) their inverse."""
    a, b = x[:, pair[0]], x[:, pair[1]]
    return jnp.concatenate([a * t[0, 0] + b * t[1, 0], a * t[0, 1] + b * t[1, 1]], axis=1)[:, back]


def _tables(n: int, increasing: bool, count: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (total, 2, n/2) of the pairs of every stage, and where each coordinate is among them (total, n)."""
    runs = [stride for p in range(total // count) for stride in strides(count, increasing ^ (p % 2 == 1))]
    pairs = np.stack([np.arange(n).reshape(-1, 2, s).swapaxes(0, 1).reshape(2, -1) for s in runs])
    return pairs.astype(np.int32), np.argsort(pairs.reshape(total, n), axis=1).astype(np.int32)


def _better(new: jax.Array, new_error: jax.Array, old: jax.Array, error: jax.Array) -> tuple[jax.Array, jax.Array]:
    take = new_error < error
    return jnp.where(take, new, old), jnp.where(take, new_error, error)


def _even(stages: jax.Array) -> jax.Array:
    """The same matrix with the norm spread evenly over the stages."""
    norms = jnp.linalg.norm(stages.reshape(stages.shape[0], -1), axis=1)
    safe = jnp.where(norms > 0, norms, 1)
    even = jnp.exp(jnp.mean(jnp.log(safe))) / safe
    return stages * jnp.where(jnp.all(norms > 0), even, 1)[:, None, None, None]
