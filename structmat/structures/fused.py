"""Sums whose product takes one pass over x where a kernel serves the chip."""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.low_rank_plus_block_sparse import low_rank_plus_block_sparse
from structmat.structures.base import Bound
from structmat.structures.block_sparse import BoundBlockSparse
from structmat.structures.leaf import Params
from structmat.structures.low_rank import BoundLowRank


def fused_product(terms: tuple[Bound, ...]) -> Callable[[Params, jax.Array], jax.Array] | None:
    """(parameters of the sum, x) -> y for one bare low_rank and one bare block_sparse term, else None."""
    kinds = [type(term) for term in terms]
    if len(kinds) != 2 or set(kinds) != {BoundLowRank, BoundBlockSparse}:
        return None
    low_rank, block_sparse = (str(kinds.index(kind)) for kind in (BoundLowRank, BoundBlockSparse))

    def product(params: Params, x: jax.Array) -> jax.Array:
        thin, blocks = params[low_rank], params[block_sparse]
        return low_rank_plus_block_sparse(x, thin["a"], thin["b"], blocks["values"], blocks["rows"])

    return product
