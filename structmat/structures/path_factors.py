"""CP factors of the path-summed Clebsch-Gordan tensor (Lin et al. 2025, arXiv 2507.01131): the tensor as R outer products.

The paper fits by Adam on sampled inputs; here alternating least squares acts on the tensor itself, in double precision, so that
the fit holds for all inputs alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.clebsch_gordan import path_tensor, wigner
from structmat.structures.cp_format import CPFormat


@dataclasses.dataclass(frozen=True, eq=False)
class PathFactors:
    """M_ijk ~ sum_r A_ir B_jr C_kr for the tensor M of `path_tensor(*degrees)`. Hashed by identity: a module can hold it.

    Attributes:
      degrees: the highest of the left input, the right input and the output.
      cores: A, B, C f64 ((l+1)^2, R).
    """

    degrees: tuple[int, int, int]
    cores: tuple[np.ndarray, np.ndarray, np.ndarray]

    @staticmethod
    def fit(left: int, right: int, out: int, rank: int, key: jax.Array | None = None) -> PathFactors:
        """The best of several runs of alternating least squares, by `CPFormat.project` in f64; fixed starts without `key`.

        Raises:
          StructureError: a degree outside 0..6, or a rank that `CPFormat` refuses.
        """
        tensor = path_tensor(left, right, out)
        form = CPFormat.of(tensor.shape, rank)
        with jax.enable_x64(True):
            cores = [np.asarray(core) for core in form.project(jnp.asarray(tensor), key=key)]
        return PathFactors((left, right, out), tuple(cores))

    @staticmethod
    def exact(left: int, right: int, out: int) -> PathFactors:
        """Every entry pair (i, j) a term of its own: R = (left+1)^2 (right+1)^2, no error and no gain."""
        tensor = path_tensor(left, right, out)
        a, b, c = tensor.shape
        first, second = np.repeat(np.eye(a), b, axis=1), np.tile(np.eye(b), a)
        return PathFactors((left, right, out), (first, second, tensor.reshape(a * b, c).T))

    @property
    def rank(self) -> int:
        """R."""
        return self.cores[0].shape[1]

    def materialize(self) -> np.ndarray:
        """The approximation of M, f64."""
        return np.einsum("ir,jr,kr->ijk", *self.cores, optimize=True)

    def error(self) -> float:
        """|approximation - M| / |M|."""
        tensor = path_tensor(*self.degrees)
        return float(np.linalg.norm(self.materialize() - tensor) / np.linalg.norm(tensor))

    def equivariance_errors(self, rotations: np.ndarray) -> np.ndarray:
        """How far turning the inputs is from turning the output, relative to M, per rotation of `rotations` (n, 3, 3).

        The root mean square over normal inputs x, y of |D z(x, y) - z(D x, D y)| over that of |M(x, y)|, in closed form: the
        distance of the approximation from its own turned copy, over |M|. At most twice `error`, because M turned is M.
        """
        found, scale = self.materialize(), np.linalg.norm(path_tensor(*self.degrees))
        return np.array([np.linalg.norm(turned(found, self.degrees, r) - found) / scale for r in rotations])


def turned(tensor: np.ndarray, degrees: Sequence[int], rotation: np.ndarray) -> np.ndarray:
    """The tensor T' of D z(x, y) = T'(D x, D y), where z = T(x, y) and every D turns its side by `rotation` (3, 3)."""
    left, right, out = (wigner(l, rotation) for l in degrees)
    return np.einsum("ai,bj,ck,ijk->abc", left, right, out, tensor, optimize=True)
