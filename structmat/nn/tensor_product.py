"""Rotation-equivariant bilinear layers: the Clebsch-Gordan tensor product plain, and by CP factors.

Lin et al., "Tensor Decomposition Networks for Fast Machine Learning Interatomic Potential Computations", NeurIPS 2025,
arXiv 2507.01131. A feature is `(..., channels, (l+1)^2)`, its last axis as in `structmat.structures.clebsch_gordan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.structures import StructureError
from structmat.structures.clebsch_gordan import block, degree, path_tensor, paths, unit_path
from structmat.structures.errors import suggest
from structmat.structures.path_factors import PathFactors

MODES = {
    "uvw": ("u", "v", "uvw", "w"),
    "uvu": ("u", "v", "uv", "u"),
    "uvv": ("u", "v", "uv", "v"),
    "uuw": ("u", "u", "uw", "w"),
    "uuu": ("u", "u", "u", "u"),
}
"""How channels meet: those of x, of y, of the weights, of the output."""


def plain_product(tensor: jax.Array, x: jax.Array, y: jax.Array, weights: jax.Array, mode: str) -> jax.Array:
    """z_k = sum_ij M_ijk x_i y_j for M `(d1, d2, d3)`, channels joined by `mode`: one GEMM of all products x_i y_j.

    Args:
      x, y: `(..., u, d1)` and `(..., v, d2)`. weights: `(..., *channels)`, the same for all paths.
    """
    pairs = _pairs(x, y, weights, mode)
    return pairs @ tensor.reshape(-1, tensor.shape[-1])


def cp_product(cores: Sequence[jax.Array], x: jax.Array, y: jax.Array, weights: jax.Array, mode: str) -> jax.Array:
    """The same for M_ijk = sum_r A_ir B_jr C_kr with cores `(d, R)`: z = C ((A^T x) * (B^T y)), channels joined in between."""
    a, b, c = cores
    left, right, channels, out = MODES[mode]
    joined = jnp.einsum(f"...{left}r,...{right}r,...{channels}->...{out}r", x @ a, y @ b, weights)
    return joined @ c.T


def path_product(x: jax.Array, y: jax.Array, weights: jax.Array, mode: str, out: int) -> jax.Array:
    """The same path by path, each with weights of its own `(..., paths, *channels)` in the order of `paths`."""
    found = paths(degree(x.shape[-1]), degree(y.shape[-1]), out)
    trailing = (slice(None),) * len(MODES[mode][2])
    parts: dict[int, jax.Array] = {}
    for p, (l1, l2, l3) in enumerate(found):
        pairs = _pairs(x[..., block(l1)], y[..., block(l2)], weights[(..., p, *trailing)], mode)
        part = pairs @ jnp.asarray(unit_path(l1, l2, l3).reshape(-1, 2 * l3 + 1), pairs.dtype)
        parts[l3] = parts[l3] + part if l3 in parts else part
    empty = next(iter(parts.values()))[..., :1]
    zeros = lambda l: jnp.zeros((*empty.shape[:-1], 2 * l + 1), empty.dtype)
    return jnp.concatenate([parts[l] if l in parts else zeros(l) for l in range(out + 1)], axis=-1)


def _pairs(x: jax.Array, y: jax.Array, weights: jax.Array, mode: str) -> jax.Array:
    """x_i y_j with channels joined, `(..., out, d1 d2)`."""
    left, right, channels, out = MODES[mode]
    pairs = jnp.einsum(f"...{left}i,...{right}j,...{channels}->...{out}ij", x, y, weights)
    return pairs.reshape(*pairs.shape[:-2], -1)


def plain_flops(shape: Sequence[int]) -> int:
    """FLOPs of `plain_product` per pair of vectors in mode `uuu` for a tensor of `shape`: the weight, the products, a GEMM."""
    d1, d2, d3 = shape
    return min(d1, d2) + d1 * d2 + 2 * d1 * d2 * d3


def cp_flops(shape: Sequence[int], rank: int) -> int:
    """FLOPs of `cp_product` per pair of vectors in mode `uuu`: three GEMMs, the weight, the products."""
    return 2 * rank * sum(shape) + 2 * rank


def path_flops(left: int, right: int, out: int) -> int:
    """FLOPs of `path_product` per pair of vectors in mode `uuu`."""
    sizes = [[2 * l + 1 for l in path] for path in paths(left, right, out)]
    return sum(plain_flops(s) for s in sizes)


def weight_shape(mode: str, left: int, right: int, features: int | None) -> tuple[int, ...]:
    """Shape of the weights that join `left` and `right` channels.

    Raises:
      StructureError: an unknown mode; channels that must be equal and are not; `features` missing where the mode has an output
        axis of its own (uvw, uuw), or given where it has none.
    """
    if mode not in MODES:
        raise StructureError(f"tensor product: no mode {mode!r}" + suggest(mode, MODES))
    if MODES[mode][1] == "u" and left != right:
        raise StructureError(f"tensor product: mode {mode} needs as many channels in y as in x, got {right} and {left}")
    if ("w" in mode) != (features is not None):
        need = "needs features=..." if "w" in mode else "takes no features"
        raise StructureError(f"tensor product: mode {mode} {need}, got features={features}")
    sizes = {"u": left, "v": right, "w": features}
    return tuple(sizes[c] for c in MODES[mode][2])


class TensorProduct(nn.Module):
    """x `(..., u, (l1+1)^2)`, y `(..., v, (l2+1)^2)` -> `(..., channels, (out+1)^2)`, bilinear.

    Exactly equivariant, one weight per path and channels (`shared=False`) or one for all paths; or with `factors` nearly so, by
    as much as these miss the paths' sum. Each path has Frobenius norm 1, so that components of RMS 1 give a few tenths to
    about 2. Factors stand in the collection `frozen`, apart from what trains, decays and is counted as parameters.

    Attributes:
      out: highest degree of the output; that of x if left out.
      mode: how channels meet, a key of MODES; weights of standard deviation 1/sqrt(terms summed per output channel).
      features: output channels, for modes uvw and uuw.
      shared: whether all paths have the same weights.
      factors: CP factors of the sum of all paths, for `shared` weights.
      dtype: of the computation; promoted from inputs and weights if left out. param_dtype: of weights and factors.
    """

    out: int | None = None
    mode: str = "uvu"
    features: int | None = None
    shared: bool = True
    factors: PathFactors | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Args:
          weights: in the place of own ones, `(..., [paths,] *channels)`, such as a network of the distance gives per edge.

        Raises:
          StructureError: axes that are not (l+1)^2, channels or weights that do not fit the mode, factors of other degrees
            or without shared weights.
        """
        left, right = degree(x.shape[-1]), degree(y.shape[-1])
        out = left if self.out is None else self.out
        degrees = (left, right, out)
        shape = weight_shape(self.mode, x.shape[-2], y.shape[-2], self.features)
        if not self.shared:
            shape = (len(paths(*degrees)), *shape)
        if self.factors is not None and (self.factors.degrees != degrees or not self.shared):
            raise StructureError(
                f"tensor product: factors of degrees {self.factors.degrees} need inputs and output of these degrees and "
                f"shared weights, got degrees {degrees}, shared={self.shared}"
            )
        if weights is None:
            weights = self.param("weights", nn.initializers.normal(self._std(x, y)), shape, self.param_dtype)
        elif weights.shape[weights.ndim - len(shape) :] != shape:
            raise StructureError(f"tensor product: weights of shape {weights.shape} must end in {shape}")
        dtype = self.dtype or jnp.result_type(x.dtype, y.dtype, weights.dtype)
        x, y, weights = (a.astype(dtype) for a in (x, y, weights))
        if not self.shared:
            return path_product(x, y, weights, self.mode, out)
        if self.factors is None:
            return plain_product(jnp.asarray(path_tensor(*degrees), dtype), x, y, weights, self.mode)
        names = ("factor_x", "factor_y", "factor_out")
        own = lambda name, core: self.variable("frozen", name, lambda: jnp.asarray(core, self.param_dtype)).value
        cores = [own(name, core).astype(dtype) for name, core in zip(names, self.factors.cores)]
        return cp_product(cores, x, y, weights, self.mode)

    def _std(self, x: jax.Array, y: jax.Array) -> float:
        left, right, _, out = MODES[self.mode]
        sizes = {left: x.shape[-2], right: y.shape[-2]}
        return 1 / math.sqrt(math.prod(n for c, n in sizes.items() if c != out))
