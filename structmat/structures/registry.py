"""Every name the text form knows. A new family is one line: the module that defines it."""

from __future__ import annotations

import importlib

from structmat.structures.algebra import Product
from structmat.structures.bottleneck import Bottleneck
from structmat.structures.btt_moe import BttMoe
from structmat.structures.elementwise import Elementwise
from structmat.structures.fit import Fit
from structmat.structures.lost import Lost
from structmat.structures.masked import Masked
from structmat.structures.normalized import Dora, FakeQuantized, WeightNorm
from structmat.structures.ordered import Ordered
from structmat.structures.parallel_branches import Parallel
from structmat.structures.rebuilt import Rebuilt
from structmat.structures.recipe import Structure
from structmat.structures.sst import Sst
from structmat.structures.unstructured import Unstructured
from structmat.structures.wrappers import Frozen, Scaled, Transpose

_MODULES = (
    "dense",
    "low_rank",
    "spectral",
    "diagonal",
    "block_diagonal",
    "block_low_rank",
    "monarch",
    "block_tensor_train",
    "kronecker",
    "tensor_train",
    "tensor_ring",
    "tucker",
    "cp",
    "random_sparse",
    "n_m_sparse",
    "block_sparse",
    "channel_sparse",
    "dictionary",
    "quantized",
    "einsum",
    "blast",
    "fourier",
    "dct",
    "hadamard",
    "toeplitz",
    "circulant",
    "block_circulant",
    "butterfly",
    "permutation",
    "identity",
    "householder",
)


def _family(module: str) -> type[Structure]:
    """The one recipe a module of this package defines; its text name is the module's."""
    defined = vars(importlib.import_module(f"structmat.structures.{module}")).values()
    found = [
        c for c in defined if isinstance(c, type) and issubclass(c, Structure) and c.__dict__.get("name") == module
    ]
    if len(found) != 1:
        raise TypeError(f"structures/{module}.py must define one Structure with name = {module!r}, found {len(found)}")
    return found[0]


FAMILIES: dict[str, type[Structure]] = {module: _family(module) for module in _MODULES}

COMBINATORS: dict[str, type[Structure]] = {
    "dora": Dora,
    "elementwise": Elementwise,
    "fake_quantized": FakeQuantized,
    "fit": Fit,
    "frozen": Frozen,
    "masked": Masked,
    "product": Product,
    "rebuilt": Rebuilt,
    "scaled": Scaled,
    "transpose": Transpose,
    "unstructured": Unstructured,
    "weight_norm": WeightNorm,
}

NONLINEAR: dict[str, type[Structure]] = {
    "bottleneck": Bottleneck,
    "btt_moe": BttMoe,
    "lost": Lost,
    "parallel": Parallel,
}
"""What stands where a matrix does, and is none."""

TRAINED: dict[str, type[Structure]] = {"ordered": Ordered, "sst": Sst}
"""Any matrix, stored as the method that trains it wants it."""

CONSTRUCTORS = FAMILIES | COMBINATORS | NONLINEAR | TRAINED
