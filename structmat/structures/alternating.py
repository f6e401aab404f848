"""Alternating least squares as the N-d formats use it: sweeps from several starts, the best iterate of all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.linalg import truncated_svd

_TRIAL = (
    150  # sweeps after which the worse half of the starts is given up; after 20 the best one was sometimes among it
)
_PATIENCE = 4  # sweeps in a row that improve nothing after which a start is done

Cores = Sequence[jax.Array]


def effort(size: int) -> tuple[int, int]:
    """(random starts, most sweeps from a start) for a tensor of `size` numbers.

    Local minima are many: 24 starts where they cost nothing (to 2^13 numbers), down to 4 from 2^16; 500 sweeps to 2^15
    numbers, down to 100.
    """
    return max(4, min(24, 2**18 // size)), max(100, min(500, 2**24 // size))


def best_of(
    starts: Cores,
    sweep: Callable[[Any], Any],
    error: Callable[[Any], jax.Array],
    tensor: jax.Array,
) -> list[jax.Array]:
    """The cores of least error met while sweeping from every start; no worse than any of the starts.

    Args:
      starts: cores of equal shapes and dtypes. After a few sweeps from each the better half goes on.
      sweep: cores -> cores, one round of exact least-squares updates.
      error: cores -> norm of the residual, computed from the residual itself.
      tensor: an error of rounding size beside its norm ends the search.

    Before a sweep a step further along the last one is tried, and taken where it lowers the error (Bro 1998): that carries
    alternating least squares through its long flat stretches. A start ends when several sweeps in a row improve on its
    best error by less than 1e-9 of it (1e-6 in f32), or at the limit of `effort`.
    """
    scale, most = norm(tensor), effort(tensor.size)[1]
    count = len(starts[0])
    if count == 1:
        return _descend([c[0] for c in starts], most, sweep, error, scale)[0]

    def heat(state: tuple, rung: jax.Array) -> tuple:
        """One round over all starts, one after the other, so that it needs the memory of one."""
        cores, errors = state
        place = jnp.argsort(jnp.argsort(errors))
        limits = jnp.where(rung == 0, _TRIAL, jnp.where(2 * place < count, most, 0))
        return lax.map(lambda each: _descend(*each, sweep, error, scale), (cores, limits)), None

    unknown = jnp.zeros(count, scale.dtype)
    (found, errors), _ = lax.scan(heat, (list(starts), unknown), jnp.arange(2))
    at = jnp.argmin(errors)
    return [c[at] for c in found]


def _descend(
    start: list[jax.Array], limit: jax.Array | int, sweep: Callable, error: Callable, scale: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    eps = jnp.finfo(scale.dtype).eps
    tolerance, floor = max(1e-9, 8 * float(eps)), 4 * eps * scale

    def going(state: tuple) -> jax.Array:
        count, *_, least, _, stalls = state
        return (count < limit) & (stalls < _PATIENCE) & (least > floor)

    def step(state: tuple) -> tuple:
        count, cores, previous, best, least, last, stalls = state
        reach = jnp.cbrt(count.astype(scale.dtype))
        ahead = [c + reach * (c - p) for c, p in zip(cores, previous)]
        taken = error(ahead) < last
        new = sweep([jnp.where(taken, a, c) for a, c in zip(ahead, cores)])
        now = error(new)
        best = [jnp.where(now < least, n, b) for n, b in zip(new, best)]
        stalls = jnp.where(now < least * (1 - tolerance), 0, stalls + 1)
        return count + 1, new, cores, best, jnp.minimum(now, least), now, stalls

    first = error(start)
    zero = jnp.zeros((), jnp.int32)
    state = lax.while_loop(going, step, (zero, start, start, start, first, first, zero))
    return state[3], state[4]


def draw(key: jax.Array, shapes: Sequence[tuple[int, ...]], tensor: jax.Array) -> list[jax.Array]:
    """Random starts `(starts, *shape)`: normal entries, in every other start their moduli, as smooth tensors want.

    One more than `effort` says, the first to be replaced by a computed one. One call of the generator, which compiles
    faster than many.
    """
    sizes = [math.prod(s) for s in shapes]
    count = 1 + effort(tensor.size)[0]
    flat = jax.random.normal(key, (count, sum(sizes)), tensor.dtype)
    flat = flat.at[1::2].set(jnp.abs(flat[1::2]))
    parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1], axis=1)
    return [part.reshape(count, *s) for part, s in zip(parts, shapes)]


def replace_first(starts: list[jax.Array], cores: Cores) -> list[jax.Array]:
    """The starts with `cores` as the first one."""
    return [s.at[0].set(c) for s, c in zip(starts, cores)]


def append(starts: list[jax.Array], cores: Cores) -> list[jax.Array]:
    """The starts with `cores` as the last one."""
    return [jnp.concatenate([s, c[None].astype(s.dtype)]) for s, c in zip(starts, cores)]


def over_gram(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """x `(p, r)` of x gram = rows, for the Gram matrix `(r, r)` of some columns and `(p, r)` rows.

    Columns are scaled to unit size and eigenvectors of rounding size left out, so that dependent columns do no harm.
    """
    size = jnp.sqrt(jnp.real(jnp.diagonal(gram)))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    values, vectors = jnp.linalg.eigh(gram * inverse[:, None] * inverse)
    keep = values > jnp.finfo(size.dtype).eps * len(size)
    values = jnp.where(keep, 1 / jnp.where(keep, values, 1), 0)
    return (((rows * inverse) @ vectors) * values) @ vectors.T.conj() * inverse


def least_squares(design: jax.Array, target: jax.Array) -> jax.Array:
    """x `(p, r)` with |x design - target| least, for design `(r, q)` and target `(p, q)`.

    Normal equations and one step of refinement, which restores most of what squaring the condition number loses: only
    products of matrices touch the long side.
    """
    adjoint = design.T.conj()
    gram = design @ adjoint
    x = over_gram(target @ adjoint, gram)
    return x + over_gram((target - x @ design) @ adjoint, gram)


def leading_vectors(matrix: jax.Array, rank: int) -> jax.Array:
    """The `rank` leading left singular vectors of `(p, q)`, signs fixed; a wide matrix goes through its QR first."""
    rows, columns = matrix.shape
    if columns > 2 * rows:
        matrix = jnp.linalg.qr(matrix.mT.conj(), mode="r").mT.conj()
    return truncated_svd(matrix, rank)[0]


def unfold(tensor: jax.Array, axis: int) -> jax.Array:
    """`(n_axis, rest)`."""
    return jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def norm(tensor: jax.Array) -> jax.Array:
    """Frobenius norm of an array of any order."""
    return jnp.linalg.norm(tensor.reshape(-1))


def even_norms(cores: Cores) -> list[jax.Array]:
    """The cores scaled to one common norm, their product unchanged; zero where one of them is."""
    norms = jnp.stack([norm(c) for c in cores])
    common = jnp.exp(jnp.mean(jnp.log(jnp.where(norms > 0, norms, 1))))
    alive = jnp.all(norms > 0)
    return [jnp.where(alive, c * (common / jnp.where(n > 0, n, 1)), 0) for c, n in zip(cores, norms)]
