"""Optax transformations that know about structure."""

from structmat.optim.build import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from structmat.optim.mup import decay_mask, leaf_multiplier, multipliers, scale_by_tree

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "decay_mask",
    "leaf_multiplier",
    "make_optimizer",
    "make_schedule",
    "multipliers",
    "scale_by_tree",
]
