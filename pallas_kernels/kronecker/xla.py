"""The product with a sum of Kronecker products as two GEMMs, the cheaper order of the factors first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def a_first(n1: int, n2: int, m1: int, m2: int) -> bool:
    """Whether applying A before B is the cheaper order."""
    return n2 * m1 * (n1 + m2) <= n1 * m2 * (n2 + m1)


def two_gemms(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (M, n1 n2), a (terms, n1, m1), b (terms, n2, m2) -> (M, m1 m2)."""
    (_, n1, m1), (_, n2, m2) = a.shape, b.shape
    if a_first(n1, n2, m1, m2):
        return _two_stage(a, b, x.reshape(-1, n1, n2))
    y = _two_stage(b, a, x.reshape(-1, n1, n2).swapaxes(1, 2))
    return y.reshape(-1, m2, m1).swapaxes(1, 2).reshape(-1, m1 * m2)


def _two_stage(first: jax.Array, second: jax.Array, x: jax.Array) -> jax.Array:
    """first (t, i, p), second (t, j, q), x (rows, i, j) -> (rows, p * q).

    One term makes both stages plain GEMMs around one transpose each of x and y; more terms fold into the contraction
    of the second stage, with the rows kept innermost so that nothing but x and y is transposed.
    """
    (terms, i, p), (_, j, q) = first.shape, second.shape
    rows = x.shape[0]
    if terms == 1:
        z = first[0].T @ x.swapaxes(0, 1).reshape(i, rows * j)
        y = z.reshape(p * rows, j) @ second[0]
        return y.reshape(p, rows, q).swapaxes(0, 1).reshape(rows, p * q)
    weight = first.transpose(2, 0, 1).reshape(p * terms, i)
    z = weight @ x.reshape(rows, i * j).T.reshape(i, j * rows)
    weight = jnp.broadcast_to(second.transpose(2, 0, 1).reshape(1, q, terms * j), (p, q, terms * j))
    y = lax.dot_general(weight, z.reshape(p, terms * j, rows), (((2,), (1,)), ((0,), (0,))))
    return y.reshape(p * q, rows).T
