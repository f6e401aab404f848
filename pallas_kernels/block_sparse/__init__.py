"""Block-sparse products in blocked-ELL layout."""

from pallas_kernels.block_sparse.api import block_sparse, choose
from pallas_kernels.block_sparse.reference import reference

__all__ = ["block_sparse", "choose", "reference"]
