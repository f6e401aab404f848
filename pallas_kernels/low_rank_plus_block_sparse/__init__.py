"""Products with the sum of a low-rank and a block-sparse matrix."""

from pallas_kernels.low_rank_plus_block_sparse.api import choose, low_rank_plus_block_sparse
from pallas_kernels.low_rank_plus_block_sparse.reference import reference

__all__ = ["choose", "low_rank_plus_block_sparse", "reference"]
