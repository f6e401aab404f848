"""Truncated SVDs with fixed signs, and the square roots of grams that weighted projections need."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.errors import StructureError


def working_dtype(w: jax.Array) -> jnp.dtype:
    """Decompositions run in f32, or f64 where the input is f64 (complex likewise)."""
    return jnp.promote_types(w.dtype, jnp.float32)


def truncated_svd(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Best rank-`rank` factors of w `(..., m, n)`: u `(..., m, r)`, s `(..., r)`, vt `(..., r, n)`.

    Signs are fixed: the entry of largest modulus of each left vector is positive.
    """
    w = w.astype(working_dtype(w))
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    u, vt = _fix_signs(u[..., :rank], vt[..., :rank, :])
    return u, s[..., :rank], vt


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


def gram_roots(gram: jax.Array, size: int, what: str) -> tuple[jax.Array, jax.Array]:
    """A square root of a gram and its pseudo-inverse: vectors for a diagonal gram, else symmetric matrices.

    Directions that carry no weight (eigenvalue below eps * size * largest) are inverted to zero.

    Raises:
      StructureError: the gram has another size, or a vector with negative entries (checked when concrete).
    """
    if gram.shape not in ((size,), (size, size)):
        raise StructureError(f"{what} must have shape ({size},) or ({size}, {size}), got {gram.shape}")
    gram = gram.astype(working_dtype(gram))
    if gram.ndim == 1:
        if not isinstance(gram, jax.core.Tracer) and (least := np.min(np.asarray(gram))) < 0:
            raise StructureError(f"{what} must not have negative entries; smallest is {least:.3g}")
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
