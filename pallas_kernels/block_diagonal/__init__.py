"""Products with block-diagonal matrices."""

from pallas_kernels.block_diagonal.api import block_diagonal, choose
from pallas_kernels.block_diagonal.reference import reference

__all__ = ["block_diagonal", "choose", "reference"]
