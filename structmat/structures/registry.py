"""Every name the text form knows, one line each."""

from structmat.structures.algebra import Product
from structmat.structures.block_diagonal import BlockDiagonal
from structmat.structures.block_low_rank import BlockLowRank
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.dense import Dense
from structmat.structures.diagonal import Diagonal
from structmat.structures.fit import Fit
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.masked import Masked
from structmat.structures.monarch import Monarch
from structmat.structures.n_m_sparse import NMSparse
from structmat.structures.normalized import Dora, FakeQuantized, WeightNorm
from structmat.structures.random_sparse import RandomSparse
from structmat.structures.recipe import Structure
from structmat.structures.spectral import Spectral
from structmat.structures.tensor_train import TensorTrain
from structmat.structures.wrappers import Frozen, Scaled, Transpose

FAMILIES: dict[str, type[Structure]] = {
    "dense": Dense,
    "low_rank": LowRank,
    "spectral": Spectral,
    "diagonal": Diagonal,
    "block_diagonal": BlockDiagonal,
    "block_low_rank": BlockLowRank,
    "monarch": Monarch,
    "block_tensor_train": BlockTensorTrain,
    "kronecker": Kronecker,
    "tensor_train": TensorTrain,
    "random_sparse": RandomSparse,
    "n_m_sparse": NMSparse,
}

COMBINATORS: dict[str, type[Structure]] = {
    "dora": Dora,
    "fake_quantized": FakeQuantized,
    "fit": Fit,
    "frozen": Frozen,
    "masked": Masked,
    "product": Product,
    "scaled": Scaled,
    "transpose": Transpose,
    "weight_norm": WeightNorm,
}

CONSTRUCTORS = FAMILIES | COMBINATORS
