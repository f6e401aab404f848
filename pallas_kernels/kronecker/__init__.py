"""Products with sums of Kronecker products."""

from pallas_kernels.kronecker.api import choose, kronecker
from pallas_kernels.kronecker.reference import reference

__all__ = ["choose", "kronecker", "reference"]
