"""Products of structured matrices as Pallas kernels, with plain jax.numpy beside every one. Knows nothing of structmat."""

from pallas_kernels.chips import CHIPS, Chip, current_chip
from pallas_kernels.dispatch import Choice, KernelError

__all__ = ["CHIPS", "Chip", "Choice", "KernelError", "current_chip"]
