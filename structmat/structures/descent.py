"""The promise `project(like=...)` makes: never worse than what one starts from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from structmat.structures.base import Bound
from structmat.structures.leaf import Params
from structmat.structures.linalg import scale_columns, scale_rows


def squared_error(
    difference: jax.Array, in_gram: jax.Array | None = None, out_gram: jax.Array | None = None
) -> jax.Array:
    """|A^(1/2) D B^(1/2)|^2 of a difference D `(d_in, d_out)`; a gram is a vector, a matrix or None."""
    return jnp.sum(jnp.real(difference.conj() * scale_columns(scale_rows(in_gram, difference), out_gram)))


def keep_better(
    bound: Bound,
    w: jax.Array,
    new: dict[str, Any],
    like: Params | None,
    in_gram: jax.Array | None = None,
    out_gram: jax.Array | None = None,
) -> dict[str, Any]:
    """`new`, or `like` where its matrix is nearer to `w`; traceable."""
    if like is None:
        return new
    error = lambda params: squared_error(w - bound.materialize(params), in_gram, out_gram)
    stay = error(like) < error(new)
    return jax.tree.map(lambda old, fresh: jnp.where(stay, old, fresh).astype(fresh.dtype), dict(like), new)
