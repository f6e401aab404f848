"""Products of structured matrices as Pallas kernels, with plain jax.numpy beside every one. Knows nothing of structmat."""

from pallas_kernels.chips import CHIPS, Chip, current_chip
from pallas_kernels.dispatch import Choice, KernelError, asking, only_xla

__all__ = ["CHIPS", "Chip", "Choice", "KernelError", "asking", "current_chip", "only_xla"]
