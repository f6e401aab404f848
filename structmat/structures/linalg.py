"""Truncated SVDs with fixed signs, exact or randomised, and the square roots of grams weighted projections need."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.errors import StructureError, suggest


@dataclasses.dataclass(frozen=True)
class SVDMethod:
    """How truncated SVDs are computed; hashable, so that it can be part of a compilation's key. See `svd_method`."""

    name: str = "exact"
    iterations: int = 6
    oversample: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("exact", "randomized"):
            raise StructureError(f"svd_method: no method {self.name!r}" + suggest(self.name, ("exact", "randomized")))
        for what in ("iterations", "oversample"):
            if getattr(self, what) < 0:
                raise StructureError(f"svd_method: {what} must not be negative, got {getattr(self, what)}")


_EXACT = SVDMethod()
_METHOD = contextvars.ContextVar("svd_method", default=_EXACT)


def current_svd() -> SVDMethod:
    """The method in force here."""
    return _METHOD.get()


@contextlib.contextmanager
def using(method: SVDMethod) -> Iterator[None]:
    """Truncated SVDs traced inside follow `method`."""
    token = _METHOD.set(method)
    try:
        yield
    finally:
        _METHOD.reset(token)


def svd_method(
    name: str, *, iterations: int = 6, oversample: int = 10, seed: int = 0
) -> contextlib.AbstractContextManager[None]:
    """`with svd_method("randomized"):` makes every truncated SVD of the projections inside a randomised one.

    `exact`, the default, is LAPACK's or the backend's economy SVD. `randomized` is the block Krylov iteration (Halko et
    al. 2011; Musco and Musco 2015): it spans w omega, (w w^H) w omega, ..., QR at every step, with rank + `oversample`
    random columns omega drawn from `seed`. It is taken where its basis of (iterations + 1) (rank + oversample) columns
    is at most half of the smaller side, elsewhere SVDs stay exact. It is never taken unasked: on a flat spectrum its
    error exceeds the optimum by 1e-4 of it at six iterations and by 5e-4 at four, and no cheap test tells beforehand
    (`python -m experiments.projection --svd` measures). Read when a function is traced: `structmat.project` keeps the
    methods apart, under your own `jax.jit` put the `with` inside the jitted function.
    """
    return using(SVDMethod(name, iterations, oversample, seed))


def jit_projection(*static_argnums: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `jax.jit` of an inner loop that computes truncated SVDs, compiled apart for every SVD method."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(jax.jit, static_argnums=(0, *(i + 1 for i in static_argnums)))
        def compiled(method: SVDMethod, *args: Any) -> Any:
            with using(method):
                return function(*args)

        return functools.wraps(function)(lambda *args: compiled(current_svd(), *args))

    return decorate


def working_dtype(w: jax.Array) -> jnp.dtype:
    """Decompositions run in f32, or f64 where the input is f64 (complex likewise)."""
    return jnp.promote_types(w.dtype, jnp.float32)


def truncated_svd(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best rank-`rank` factors of w `(..., m, n)`: u `(..., m, r)`, s `(..., r)`, vt `(..., r, n)`.

    Signs are fixed: the entry of largest modulus of each left vector is positive. `svd_method` chooses the algorithm.
    """
    w = w.astype(working_dtype(w))
    method = current_svd()
    if method.name == "randomized" and 2 * basis_columns(rank, method) <= min(w.shape[-2:]):
        u, s, vt = _krylov_svd(w, rank, method)
    else:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    u, vt = _fix_signs(u[..., :rank], vt[..., :rank, :])
    return u, s[..., :rank], vt


def basis_columns(rank: int, method: SVDMethod) -> int:
    """Columns of the basis a randomised SVD builds."""
    return (method.iterations + 1) * (rank + method.oversample)


def _krylov_svd(w: jax.Array, rank: int, method: SVDMethod) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SVD of w restricted to its block Krylov space; more triplets than `rank`, the first of them accurate."""
    orthonormal = lambda a: jnp.linalg.qr(a)[0]
    adjoint = w.mT.conj()
    omega = jax.random.normal(jax.random.key(method.seed), (w.shape[-1], rank + method.oversample), w.dtype)
    step = lambda block, _: 2 * (orthonormal(w @ orthonormal(adjoint @ block)),)
    first = orthonormal(w @ omega)
    _, blocks = jax.lax.scan(step, first, length=method.iterations)
    blocks = jnp.moveaxis(jnp.concatenate([first[None], blocks]), 0, -2)
    basis = orthonormal(blocks.reshape(*w.shape[:-1], -1))
    right, core = jnp.linalg.qr(adjoint @ basis)
    u, s, vt = jnp.linalg.svd(core.mT.conj(), full_matrices=False)
    return basis @ u[..., :rank], s, vt[..., :rank, :] @ right.mT.conj()


def _fix_signs(u: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array]:
    peak = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
    sign = jnp.where(peak == 0, 1, peak / jnp.where(peak == 0, 1, jnp.abs(peak)))
    return u / sign, vt * jnp.swapaxes(sign, -1, -2)


def svd_of_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SVD of a @ b for thin a `(m, r)` and flat b `(r, n)` without forming it; signs as in `truncated_svd`."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(b.T)
    u, s, vt = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
    u, vt = _fix_signs(qa @ u, vt @ qb.T)
    return u, s, vt


def balanced_split(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors a `(..., m, r)` and b `(..., r, n)` of the best rank-`rank` approximation, sqrt(sigma) in each."""
    u, s, vt = truncated_svd(w, rank)
    root = jnp.sqrt(s)
    return u * root[..., None, :], root[..., :, None] * vt


def weighted_split(
    w: jax.Array, rank: int, in_gram: jax.Array | None, out_gram: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Factors a `(d_in, r)` and b `(r, d_out)` of the rank-`rank` matrix nearest to w under the grams.

    With A^(1/2) w B^(1/2) = U S V^T the optimum A^(-1/2) U_r S_r V_r^T B^(-1/2) equals (w B^(1/2) V_r) S_r^-1 (U_r^T
    A^(1/2) w), which inverts no gram: in f32 the error stays that of f64 where a gram's condition is 1e8, and what a
    singular gram does not see follows w instead of falling to zero. Without grams it is `balanced_split`.
    """
    if in_gram is None and out_gram is None:
        return balanced_split(w, rank)
    w = w.astype(working_dtype(w))
    left = None if in_gram is None else gram_roots(in_gram, w.shape[0], "in_gram")[0]
    right = None if out_gram is None else gram_roots(out_gram, w.shape[1], "out_gram")[0]
    u, s, vt = truncated_svd(scale_columns(scale_rows(left, w), right), rank)
    keep = s > jnp.finfo(s.dtype).eps * s[0]
    root = jnp.where(keep, 1 / jnp.sqrt(jnp.where(keep, s, 1)), 0)
    a = w @ scale_columns(vt, right).T.conj() * root
    return a, root[:, None] * (scale_rows(left, u).T.conj() @ w)


def check_gram(gram: jax.Array, size: int, what: str, stacked: int = 0) -> None:
    """Refuse a gram of another size (after `stacked` leading axes), or a concrete vector with negative entries.

    Raises:
      StructureError: naming which.
    """
    if gram.shape[stacked:] not in ((size,), (size, size)):
        raise StructureError(f"{what} must have shape ({size},) or ({size}, {size}), got {gram.shape[stacked:]}")
    if gram.ndim - stacked == 1 and not isinstance(gram, jax.core.Tracer) and (least := np.min(np.asarray(gram))) < 0:
        raise StructureError(f"{what} must not have negative entries; smallest is {least:.3g}")


def gram_roots(gram: jax.Array, size: int, what: str) -> tuple[jax.Array, jax.Array]:
    """A square root of a gram and its pseudo-inverse: vectors for a diagonal gram, else symmetric matrices.

    Directions that carry no weight (eigenvalue below eps * size * largest) are inverted to zero.

    Raises:
      StructureError: the gram has another size, or a vector with negative entries (checked when concrete).
    """
    check_gram(gram, size, what)
    gram = gram.astype(working_dtype(gram))
    if gram.ndim == 1:
        root = jnp.sqrt(gram)
        return root, jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
    values, vectors = jnp.linalg.eigh((gram + gram.T.conj()) / 2)
    floor = jnp.finfo(gram.dtype).eps * size * jnp.maximum(values[-1], 0)
    root = jnp.sqrt(jnp.where(values > floor, values, 0))
    inverse = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
    return (vectors * root) @ vectors.T.conj(), (vectors * inverse) @ vectors.T.conj()


def diagonal_roots(gram: jax.Array, size: int, what: str, name: str) -> tuple[jax.Array, jax.Array]:
    """`gram_roots` for families solved entry group by entry group, which only a diagonal gram keeps apart.

    Raises:
      StructureError: a full gram.
    """
    if gram.ndim != 1:
        raise StructureError(f"{name}: a full {what} couples the blocks and has no closed form; pass its diagonal")
    return gram_roots(gram, size, what)


def scale_rows(root: jax.Array | None, w: jax.Array) -> jax.Array:
    """root @ w for a vector, a matrix or no root."""
    return w if root is None else (root[:, None] * w if root.ndim == 1 else root @ w)


def scale_columns(w: jax.Array, root: jax.Array | None) -> jax.Array:
    """w @ root for a vector, a matrix or no root."""
    return w if root is None else (w * root if root.ndim == 1 else w @ root)
