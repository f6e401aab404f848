"""Sparse dictionary factorisation T = D Z: batched orthogonal matching pursuit, orthonormal start, K-SVD rounds.

T `(n, m)` is the matrix to fit, D `(n, k)` has unit columns (atoms), and a code is a pair of `values` (m, s) and int32
`rows` (m, s), ascending: the s entries of each column of Z `(k, m)`. Everything is traceable, in the dtype of T.

Sources: Aharon et al. 2006 (K-SVD), Rubinstein et al. 2008 (batch OMP, approximate K-SVD), CoSpaDi (arXiv 2509.22075),
COMPOT (arXiv 2602.15200), ROCKET's refit of the dictionary (arXiv 2602.11008).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.linalg import truncated_svd

ROUNDS = 60
"""K-SVD rounds at most."""
ALTERNATIONS = 20
"""Alternations of the orthonormal start at most, as in COMPOT."""
GAIN = 2e-4
"""The round or alternation that lowers the error by a smaller share of it is the last."""
SEARCH_GAIN = 1e-5
"""The same in `search`."""
TABLE = {"cpu": 2**20}
"""Entries that the orthogonalised bases of one batch of columns may hold during matching pursuit, by backend: a CPU
wants them in its cache (measured: 3.6 times faster than 2^24 at 1024 columns, 340 atoms, 170 of them chosen)."""
WIDE_TABLE = 2**25
"""The same on accelerators, which want wide batches."""

Code = tuple[jax.Array, jax.Array]


class Fit(NamedTuple):
    """A dictionary (n, k), a code and their error |T - D Z|."""

    dictionary: jax.Array
    code: Code
    error: jax.Array


def dense_code(code: Code, k: int) -> jax.Array:
    """Z `(k, m)` of a code."""
    values, rows = code
    columns = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((values.shape[0], k), values.dtype).at[columns, rows].add(values).T


def sort_code(values: jax.Array, rows: jax.Array) -> Code:
    """The same code with ascending rows."""
    order = jnp.argsort(rows, axis=1)
    return jnp.take_along_axis(values, order, axis=1), jnp.take_along_axis(rows, order, axis=1).astype(jnp.int32)


def residual(t: jax.Array, d: jax.Array, code: Code) -> jax.Array:
    """T - D Z."""
    return t - d @ dense_code(code, d.shape[1])


def unit_atoms(d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """D with unit columns, and their norms (k,); a zero atom becomes the first unit vector."""
    norms = jnp.linalg.norm(d, axis=0)
    return jnp.where(norms > 0, d / jnp.where(norms > 0, norms, 1), jnp.zeros_like(d).at[0].set(1)), norms


def fit_of(t: jax.Array, d: jax.Array, code: Code) -> Fit:
    """The Fit of any dictionary and code, its atoms scaled to unit norm."""
    values, rows = code
    d, norms = unit_atoms(d)
    code = values * norms[rows], rows
    return Fit(d, code, jnp.linalg.norm(residual(t, d, code)))


def better(new: Fit, old: Fit) -> Fit:
    """`new` where its error is lower, else `old`; not a number is never lower."""
    return jax.tree.map(lambda a, b: jnp.where(new.error < old.error, a, b), new, old)


def threshold(correlations: jax.Array, count: int) -> Code:
    """The `count` entries of largest modulus of each column of D^T T `(k, m)`: the best code if D is orthonormal."""
    rows = lax.top_k(jnp.abs(correlations).T, count)[1]
    return sort_code(jnp.take_along_axis(correlations.T, rows, axis=1), rows)


@functools.partial(jax.jit, static_argnums=2)
def matching_pursuit(gram: jax.Array, correlations: jax.Array, count: int) -> Code:
    """Orthogonal matching pursuit: per column, `count` times the atom of largest correlation with the residual joins,
    and the values become the least-squares ones.

    Works from the Gram matrix D^T D `(k, k)` of unit atoms and D^T T `(k, m)` alone. An atom in the span of those
    chosen before gets the value zero. O(m s k^2) operations in matrix products; columns go in batches of TABLE / s^2.
    """
    k, m = correlations.shape
    slot = jnp.arange(count, dtype=jnp.int32)
    floor = 4 * count * jnp.finfo(gram.dtype).eps

    def column(target: jax.Array) -> Code:
        def step(t: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            # Row i of `basis` is the i-th orthonormal direction in terms of the chosen atoms.
            basis, coefficients, rows, used, left = state
            atom = jnp.argmax(jnp.where(used, -1, jnp.abs(left))).astype(jnp.int32)
            along = basis @ jnp.where(slot < t, gram[rows, atom], 0)
            square = gram[atom, atom] - along @ along
            scale = jnp.where(square > floor, lax.rsqrt(jnp.maximum(square, floor)), 0)
            direction = jnp.where(slot == t, 1, -(along @ basis)) * scale
            coefficient = left[atom] * scale
            rows = rows.at[t].set(atom)
            spread = jnp.zeros(k, gram.dtype).at[rows].add(direction)
            left = left - coefficient * (gram @ spread)
            basis, coefficients = basis.at[t].set(direction), coefficients.at[t].set(coefficient)
            return basis, coefficients, rows, used.at[atom].set(True), left

        zeros = functools.partial(jnp.zeros, dtype=gram.dtype)
        start = (zeros((count, count)), zeros(count), jnp.zeros(count, jnp.int32), jnp.zeros(k, bool), target)
        basis, coefficients, rows, _, _ = lax.fori_loop(0, count, step, start)
        return basis.T @ coefficients, rows

    batch = max(1, min(m, TABLE.get(jax.default_backend(), WIDE_TABLE) // count**2))
    return sort_code(*lax.map(column, correlations.T, batch_size=batch))


def pursue(t: jax.Array, d: jax.Array, count: int) -> Code:
    """The code of T over unit atoms by orthogonal matching pursuit."""
    return matching_pursuit(d.T @ d, d.T @ t, count)


def spectral_start(t: jax.Array, k: int, count: int) -> Fit:
    """The k leading left singular vectors of T; if there are fewer, completed by the columns they code worst."""
    u = truncated_svd(t, k)[0]
    have = u.shape[1]
    if have == k:
        return fit_of(t, u, threshold(u.T @ t, count))
    left = residual(t, u, threshold(u.T @ t, min(count, have)))
    worst = lax.top_k(jnp.sum(left**2, axis=0), k - have)[1]
    d, _ = unit_atoms(jnp.concatenate([u, t[:, worst]], axis=1))
    return fit_of(t, d, pursue(t, d, count))


def orthonormal_rounds(t: jax.Array, fit: Fit, useful: jax.Array | bool = True) -> Fit:
    """COMPOT: hard thresholding and Procrustes in turn, from an orthonormal dictionary, while the error falls.

    Each step is optimal with the other side fixed, so the error never rises. Not `useful`: returns `fit` at once.
    """
    k, count = fit.dictionary.shape[1], fit.code[0].shape[1]

    def alternate(fit: Fit) -> Fit:
        u, _, vt = jnp.linalg.svd(t @ dense_code(fit.code, k).T, full_matrices=False)
        d = u @ vt
        return fit_of(t, d, threshold(d.T @ t, count))

    return _descend(alternate, fit, ALTERNATIONS, useful)


def ksvd_rounds(t: jax.Array, fit: Fit, gain: float | None = None, useful: jax.Array | bool = True) -> Fit:
    """K-SVD: coding, refit of the dictionary and atom by atom updates in turn, while the error falls by `gain` (GAIN)."""
    return _descend(functools.partial(ksvd_round, t), fit, ROUNDS, useful, gain)


def tries(size: int) -> int:
    """Random starts of `search` that a matrix of `size` entries is worth: 8 to 2^15 entries, none from 2^18 on."""
    return min(8, (2**18 - 1) // size)


def search(t: jax.Array, fits: Sequence[Fit], key: jax.Array, count: int) -> Fit:
    """The best of K-SVD from `fits` and from `count` random choices of columns of T as atoms, one after the other.

    From each start ROUNDS rounds run in which every code is new, also where it fits worse: that leaves local minima.
    The best fit met is then improved by `ksvd_rounds`, so the result is no worse than any of `fits`. An error of
    rounding size ends the search.
    """
    k, nonzeros = fits[0].dictionary.shape[1], fits[0].code[0].shape[1]
    floor = 64 * jnp.finfo(t.dtype).eps * jnp.linalg.norm(t)

    def random(key: jax.Array) -> Fit:
        columns = jax.random.choice(key, t.shape[1], (k,), replace=t.shape[1] < k)
        d, _ = unit_atoms(t[:, columns])
        return fit_of(t, d, pursue(t, d, nonzeros))

    def wander(state: tuple[jax.Array, Fit, Fit]) -> tuple[jax.Array, Fit, Fit]:
        done, now, best = state
        code = pursue(t, now.dictionary, nonzeros)
        coded = fit_of(t, now.dictionary, code)
        new = _update_atoms(t, better(fit_of(t, refit(t, dense_code(code, k)), code), coded))
        return done + 1, new, better(new, best)

    def advance(best: Fit, start: Fit) -> tuple[Fit, None]:
        going = lambda state: (state[0] < ROUNDS) & (jnp.minimum(state[2].error, best.error) > floor)
        found = lax.while_loop(going, wander, (jnp.zeros((), jnp.int32), start, start))[2]
        return better(ksvd_rounds(t, found, SEARCH_GAIN, best.error > floor), best), None

    starts = jax.tree.map(lambda *each: jnp.stack(each), *fits)
    drawn = lax.map(random, jax.random.split(key, count))
    starts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), starts, drawn)
    return lax.scan(advance, functools.reduce(better, fits), starts)[0]


def _descend(
    step: Callable[[Fit], Fit], fit: Fit, most: int, going: jax.Array | bool, gain: float | None = None
) -> Fit:
    """Repeat `step` while it lowers the error by more than `gain` (GAIN) of it; the best fit seen."""
    gain = GAIN if gain is None else gain

    def advance(state: tuple[jax.Array, jax.Array, Fit]) -> tuple[jax.Array, jax.Array, Fit]:
        count, _, old = state
        new = step(old)
        return count + 1, old.error - new.error > gain * old.error, better(new, old)

    start = (jnp.zeros((), jnp.int32), jnp.asarray(going), fit)
    return lax.while_loop(lambda state: (state[0] < most) & state[1], advance, start)[2]


def ksvd_round(t: jax.Array, fit: Fit) -> Fit:
    """One round; up to rounding its error is at most that of `fit`."""
    d, (values, rows), _ = fit
    k = d.shape[1]
    fresh = pursue(t, d, values.shape[1])
    lower = jnp.sum(residual(t, d, fresh) ** 2, axis=0) < jnp.sum(residual(t, d, (values, rows)) ** 2, axis=0)
    code = jax.tree.map(lambda a, b: jnp.where(lower[:, None], a, b), fresh, (values, rows))
    coded = fit_of(t, d, code)
    refitted = better(fit_of(t, refit(t, dense_code(code, k)), code), coded)
    return _update_atoms(t, refitted)


def refit(t: jax.Array, z: jax.Array) -> jax.Array:
    """The least-squares dictionary for a given Z: T Z^T (Z Z^T)^-1, with rows of Z scaled alike and a tiny ridge."""
    norms = jnp.linalg.norm(z, axis=1)
    inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    unit = z * inverse[:, None]
    k = len(z)
    gram = unit @ unit.T + k * jnp.finfo(t.dtype).eps * jnp.eye(k, dtype=t.dtype)
    return jax.scipy.linalg.solve(gram, unit @ t.T, assume_a="pos").T * inverse


def _update_atoms(t: jax.Array, fit: Fit) -> Fit:
    """Each atom in turn and its coefficients, on their support, by one power iteration for the leading singular pair of
    what the others leave; both half steps are exact minimisations. Atoms no column uses become the worst-fitted ones.
    """
    d, (values, rows), _ = fit
    k = d.shape[1]
    support = dense_code((jnp.ones_like(values), rows), k)

    def update(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d, z, left = state
        atom, row = d[:, j], z[j]
        along = left @ row + atom * (row @ row)
        norm = jnp.linalg.norm(along)
        new = jnp.where(norm > 0, along / jnp.where(norm > 0, norm, 1), atom)
        new_row = support[j] * (new @ left + (atom @ new) * row)
        left = left + atom[:, None] * row - new[:, None] * new_row
        return d.at[:, j].set(new), z.at[j].set(new_row), left

    z = dense_code((values, rows), k)
    d, z, left = lax.fori_loop(0, k, update, (d, z, t - d @ z))
    unused = jnp.sum(z != 0, axis=1) == 0
    worst = jnp.argsort(-jnp.sum(left**2, axis=0))[jnp.cumsum(unused) - 1]
    norms = jnp.linalg.norm(t, axis=0)[worst]
    spare = unused & (norms > 0)
    d = jnp.where(spare, t[:, worst] / jnp.where(norms > 0, norms, 1), d)
    return fit_of(t, d, (jnp.take_along_axis(z.T, rows, axis=1), rows))
