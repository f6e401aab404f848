"""Products of block-low-rank matrices (Monarch, block tensor train) in two stages."""

from pallas_kernels.monarch.api import choose, monarch
from pallas_kernels.monarch.reference import reference

__all__ = ["choose", "monarch", "reference"]
