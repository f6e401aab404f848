"""What the tile tables of all TPU kernels share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.chips import MIB

LANES = 128
SPILL = 2 * MIB
"""Room for what the compiler spills, asked for beside the buffers."""


def sublanes(size: int) -> int:
    """Rows of a native tile of entries of `size` bytes."""
    return 8 * 4 // size


def token_tiles(m: int, size: int, most: int = 1024) -> list[int]:
    """Token tiles to try, largest first: `most` down to 128 by halves, or all rows (padded to whole sublanes) if fewer."""
    whole = -(-m // sublanes(size)) * sublanes(size)
    return [t for t in (1024, 512, 256, 128) if t <= min(whole, most)] or [whole]


def whole_sublanes(x: jax.Array) -> tuple[jax.Array, int]:
    """x (M, K) padded with zero rows to whole sublanes, and M."""
    m = x.shape[0]
    return jnp.pad(x, ((0, -m % sublanes(x.dtype.itemsize)), (0, 0))), m


def whole_tiles(x: jax.Array, tokens: int) -> jax.Array:
    """x (M, K) padded with zero rows to whole tiles of `tokens` rows."""
    return jnp.pad(x, ((0, -x.shape[0] % tokens), (0, 0)))
