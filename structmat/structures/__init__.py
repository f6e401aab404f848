"""What a weight is made of: recipes, bounds and their text form. Pure functions, no Flax."""

from structmat.structures.algebra import Frozen, Product, Scaled, Sum, Transpose
from structmat.structures.base import Bound, Cost, Leaf, Structure, flatten_leaves, map_leaves
from structmat.structures.errors import StructureError
from structmat.structures.fit import Fit
from structmat.structures.matrix import Matrix, project, random
from structmat.structures.registry import COMBINATORS, CONSTRUCTORS, FAMILIES
from structmat.structures.rules import Rules
from structmat.structures.text import parse

__all__ = [
    "COMBINATORS",
    "CONSTRUCTORS",
    "FAMILIES",
    "Bound",
    "Cost",
    "Fit",
    "Frozen",
    "Leaf",
    "Matrix",
    "Product",
    "Rules",
    "Scaled",
    "Structure",
    "StructureError",
    "Sum",
    "Transpose",
    "flatten_leaves",
    "map_leaves",
    "parse",
    "project",
    "random",
]
