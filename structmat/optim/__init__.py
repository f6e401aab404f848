"""Optax transformations that know about structure."""

from structmat.optim.build import OPTIMIZERS, SCHEDULES, SGD, drops, make_optimizer, make_schedule
from structmat.optim.mup import decay_mask, leaf_multiplier, multipliers, scale_by_tree
from structmat.optim.restart import needs_gradient, restart

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "decay_mask",
    "drops",
    "leaf_multiplier",
    "make_optimizer",
    "make_schedule",
    "multipliers",
    "needs_gradient",
    "restart",
    "scale_by_tree",
]
