"""Methods that move the support of masked weights, truncate dense ones, find ranks or train a part at a time, and how dense
each layer is."""

from structmat.sparse.density import densities, rules_text
from structmat.sparse.maestro import Maestro
from structmat.sparse.masks import Mask, find_masks
from structmat.sparse.relora import Merge, ReLoRA
from structmat.sparse.spectral import Sst, TurnTriplets
from structmat.sparse.topology import MoveSupport, RigL, Set, cosine_drop, move
from structmat.sparse.trp import TRP, Truncate, polar_factor, truncate

__all__ = [
    "TRP",
    "Maestro",
    "Mask",
    "Merge",
    "MoveSupport",
    "ReLoRA",
    "RigL",
    "Set",
    "Sst",
    "Truncate",
    "TurnTriplets",
    "cosine_drop",
    "densities",
    "find_masks",
    "move",
    "polar_factor",
    "rules_text",
    "truncate",
]
