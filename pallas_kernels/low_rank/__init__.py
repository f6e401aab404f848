"""Products of low rank."""

from pallas_kernels.low_rank.api import choose, low_rank
from pallas_kernels.low_rank.reference import reference

__all__ = ["choose", "low_rank", "reference"]
