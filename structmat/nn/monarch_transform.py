"""A learnable Fourier transform: a structured complex matrix that starts as the exact DFT (Dao et al. 2022).

With x read as j = p K + k and the result as t = s P + l, n = K P, the DFT is y[s P + l] = sum_k w^(k t) sum_p w^(K p l)
x[p K + k], w = exp(-2 pi i / n) (Cooley and Tukey 1965): one Monarch factor pair of slice rank 1 between two permutations
of digits, n (P + K) complex entries instead of n^2. The reference code's `ButterflyFFT` has it so.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.nn.leaves import declare
from structmat.nn.linear import PROBE, check_auxiliary, product
from structmat.nn.sites import record
from structmat.structures import Bound, Structure, StructureError, parse
from structmat.structures.block_low_rank import BlockLowRank, BoundBlockLowRank
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Leaves, Params, map_leaves
from structmat.structures.wrappers import Wrapper

Norm = Literal["backward", "ortho", "forward"]
NORMS = ("backward", "ortho", "forward")


class MonarchTransform(nn.Module):
    """x `(..., length)` real or complex -> `(..., length)` complex: at initialisation `jnp.fft.fft` or `ifft` of the last axis.

    All entries train. The one site is of kind `linear`, at the module's own path; its structure is of the matrix between the
    digit-permuted input and output. Its leaves are complex, so gradients have to be conjugated before optax, as the training step does.

    Attributes:
      length: n; a prime one is a single dense block.
      inverse: start as the inverse transform.
      norm: as in `jnp.fft`: which direction carries 1/n, or 1/sqrt(n) in both. Adam's steps are relative to the entries,
        which `ortho` leaves at about n^(-1/4) in both factors.
      structure: recipe or its text; None is block_low_rank(in_blocks=K, out_blocks=n/K, rank=1) with K the largest divisor
        of n not above sqrt(n). Others start at their projection of the DFT: dense() and monarch(blocks) are exact too.
      param_dtype: complex64 or complex128; also what it computes in.
      path: `factored`, `dense` (materialise first) or `auto`.

    Raises:
      StructureError: a length, norm, param_dtype or structure that does not fit, or an input of another length.
    """

    length: int
    inverse: bool = False
    norm: Norm = "backward"
    structure: Structure | str | None = None
    param_dtype: Any = jnp.complex64
    in_axes: Axes = None
    out_axes: Axes = None
    path: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not x.ndim or x.shape[-1] != self.length:
            raise StructureError(f"transform of length {self.length}: the input is of shape {x.shape}")
        bound = bind_transform(self.length, self.inverse, self.norm, self.structure, self.param_dtype)
        record(self.scope.path, bound, "linear", self.in_axes, self.out_axes)
        params = declare(self, bound, self.in_axes, self.out_axes, self.param_dtype)
        x = x.astype(self.param_dtype)
        y = product(bound, params, x, self.path, self.in_axes, self.out_axes)
        if self.has_variable(PROBE, "weight"):
            y = y + x @ self.get_variable(PROBE, "weight").astype(self.param_dtype)
        return y


def bind_transform(
    length: int,
    inverse: bool = False,
    norm: Norm = "backward",
    structure: Structure | str | None = None,
    param_dtype: Any = jnp.complex64,
) -> BoundTransformStart:
    """The weight of a `MonarchTransform`.

    Raises:
      StructureError: as the module does.
    """
    if length < 1:
        raise StructureError(f"a transform needs a length of at least 1, got {length}")
    if norm not in NORMS:
        raise StructureError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if jnp.dtype(param_dtype) not in (jnp.complex64, jnp.complex128):
        raise StructureError(f"param_dtype must be complex64 or complex128, got {jnp.dtype(param_dtype)}")
    blocks = max(k for k in divisors(length) if k * k <= length)
    if structure is None:
        structure = BlockLowRank(in_blocks=blocks, out_blocks=length // blocks, rank=1)
    inner = parse(structure).bind(length, length)
    check_auxiliary(inner.structure, allowed=False)
    out_blocks = length // blocks
    if isinstance(inner, BoundBlockLowRank):
        blocks, out_blocks = inner.in_blocks, inner.out_blocks if inner.order == "blocked" else 1
    kind = jnp.dtype(param_dtype).name
    return BoundTransformStart(
        inner.structure, inner.in_shape, inner.out_shape, inner, blocks, out_blocks, inverse, norm, kind
    )


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTransformStart(Wrapper):
    """A Bound with complex leaves that starts at the DFT, between two permutations: `inner` reads the input by digits
    (n/in_blocks, in_blocks), both swapped, and its output, (out_blocks, n/out_blocks), is swapped after it."""

    in_blocks: int
    out_blocks: int
    inverse: bool
    norm: Norm
    dtype: str

    @property
    def is_complex(self) -> bool:
        return True

    @property
    def grams(self) -> str:
        return "none"

    def rebind(self, structure: Structure) -> BoundTransformStart:
        """As `bind_transform`."""
        return bind_transform(self.d_in, self.inverse, self.norm, structure, self.dtype)

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        as_complex = lambda leaf: (
            leaf if leaf.law == "index" else dataclasses.replace(leaf, dtype=jnp.dtype(self.dtype))
        )
        return map_leaves(as_complex, self.inner.leaves(in_axes, out_axes, gain))

    def init(self, key: jax.Array, dtype: Any = None, gain: float = 1.0) -> dict[str, Any]:
        """The DFT's factors where the slices have rank 1, else its projection; draws nothing."""
        if gain != 1.0:
            raise StructureError(f"a transform starts at the DFT; gain must be 1, got {gain}")
        inner = self.inner
        if isinstance(inner, BoundBlockLowRank) and (inner.rank, inner.in_blocks * inner.out_blocks) == (1, self.d_in):
            factors = dft_factors(self.d_in, self.in_blocks, self.inverse, self.norm)
            return {name: jnp.asarray(f, self.dtype) for name, f in factors.items()}
        dft = dft_factors(self.d_in, 1, self.inverse, self.norm)["R"].reshape(self.d_in, self.d_in)
        return self.project(jnp.asarray(dft, self.dtype), key=key)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        y = self.inner.matmul(params, swapped_digits(x, self.in_blocks))
        return swapped_digits(y, self.d_in // self.out_blocks)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        x = self.inner.rmatmul(params, swapped_digits(y, self.out_blocks))
        return swapped_digits(x, self.d_in // self.in_blocks)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return Bound.take(self, params, ids)

    def materialize(self, params: Params) -> jax.Array:
        w = swapped_digits(self.inner.materialize(params), self.d_in // self.out_blocks)
        return swapped_digits(w.T, self.d_in // self.in_blocks).T

    def project(self, w: jax.Array, *, in_gram: Any = None, out_gram: Any = None, **kwargs: Any) -> dict[str, Any]:
        """As the structure, on `w` between the permutations; without grams."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        between = swapped_digits(swapped_digits(w, self.out_blocks).T, self.in_blocks).T
        return self.inner.project(between, **kwargs)

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Any:
        """8 FLOPs per multiply-add, which is of complex numbers."""
        found = Bound.cost(self, rows, self.dtype, path)
        return dataclasses.replace(found, flops=4 * found.flops, flops_executed=4 * found.flops_executed)


def swapped_digits(x: jax.Array, low: int) -> jax.Array:
    """x `(..., n)` with entry i = a low + b at b (n / low) + a; undone by `swapped_digits(x, n // low)`."""
    n = x.shape[-1]
    return x.reshape(*x.shape[:-1], n // low, low).swapaxes(-1, -2).reshape(x.shape)


def dft_factors(length: int, in_blocks: int, inverse: bool = False, norm: Norm = "backward") -> dict[str, np.ndarray]:
    """complex128 leaves of block_low_rank(in_blocks=K, out_blocks=P, rank=1), P = length / K, that are the DFT.

    R[k, p, l, 0] = w_P^(p l), the transforms of length P; L[l, k, 0, s] = w_n^(k (l + s P)), twiddles and the transforms of
    length K. The norm is shared, so that with `ortho` every block is unitary.
    """
    k, p = np.arange(in_blocks), np.arange(length // in_blocks)
    power = {"backward": 1.0 if inverse else 0.0, "ortho": 0.5, "forward": 0.0 if inverse else 1.0}[norm]
    turn = lambda exponent, n: np.exp((2j if inverse else -2j) * np.pi * (exponent % n) / n)
    right = turn(np.multiply.outer(p, p), len(p)) / len(p) ** power
    out = np.add.outer(p, len(p) * k)
    left = turn(k[:, None] * out[:, None, :], length) / len(k) ** power
    return {
        "R": np.tile(right[None, :, :, None], (len(k), 1, 1, 1)),
        "L": left[:, :, None, :],
    }
