"""The low-rank product as two GEMMs, which XLA fuses on TPU."""

from __future__ import annotations

import jax


def two_dots(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (..., n), a (r, n), b (r, m) -> (..., m)."""
    return (x @ a.T) @ b
