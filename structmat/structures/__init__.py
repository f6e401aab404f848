"""What a weight is made of: recipes, bounds and their text form. Pure functions, no Flax."""

from structmat.structures.algebra import Product, Sum
from structmat.structures.base import Bound
from structmat.structures.elementwise import Elementwise
from structmat.structures.errors import StructureError
from structmat.structures.fit import Fit
from structmat.structures.leaf import Cost, Leaf, flatten_leaves, map_leaves
from structmat.structures.linalg import svd_method
from structmat.structures.matrix import Matrix, project, random
from structmat.structures.recipe import Structure
from structmat.structures.registry import COMBINATORS, CONSTRUCTORS, FAMILIES
from structmat.structures.rules import Rules
from structmat.structures.stacks import project_stack
from structmat.structures.text import parse
from structmat.structures.wrappers import Frozen, Scaled, Transpose

__all__ = [
    "COMBINATORS",
    "CONSTRUCTORS",
    "FAMILIES",
    "Bound",
    "Cost",
    "Elementwise",
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
    "project_stack",
    "random",
    "svd_method",
]
