"""Sparse training: methods that move the support of masked weights, and how dense each layer is."""

from structmat.sparse.density import densities, rules_text
from structmat.sparse.masks import Mask, find_masks
from structmat.sparse.topology import MoveSupport, RigL, Set, cosine_drop, move

__all__ = [
    "Mask",
    "MoveSupport",
    "RigL",
    "Set",
    "cosine_drop",
    "densities",
    "find_masks",
    "move",
    "rules_text",
]
