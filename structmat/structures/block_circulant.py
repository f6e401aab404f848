"""Block-circulant matrices: a grid of circulant blocks, multiplied by FFT (Ding et al. 2017, "CirCNN")."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.factors import divisors
from structmat.structures.fft import by_rows, fft_flops
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class BlockCirculant(Structure):
    """`block_circulant(block)`: W[k b + i, l b + j] = c[k, l, (j - i) mod b]; b divides both sizes.

    One block is `circulant` (its rectangular cousin is `toeplitz`), blocks of 1 are dense. `paper` init is uniform
    +-1/sqrt(d_in).
    """

    block: int | None = None
    name: ClassVar[str] = "block_circulant"
    about: ClassVar[About] = About(
        example="block_circulant(block=8)",
        formula="W[kb+i, lb+j] = c[k, l, (j − i) mod b]",
        params="n m / b",
        flops="2.5 (n + m) log₂ b + n m / b, and the FFT of c once",
        nearest="optimal (mean of each wrapped diagonal), diagonal grams",
        sharding="whole blocks over both axes; as dense",
        paper="Ding et al. 2017",
        when="b times fewer parameters, every input reaching every output",
    )

    def check(self) -> None:
        self.need(block=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBlockCirculant:
        self.required("block")
        self.choose("block", divisors(math.gcd(math.prod(in_shape), math.prod(out_shape))), in_shape, out_shape)
        return BoundBlockCirculant(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.block is not None:
            return []
        sizes = divisors(math.gcd(math.prod(in_shape), math.prod(out_shape)))
        return [dataclasses.replace(self, block=b) for b in sorted(sizes, reverse=True)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlockCirculant(Bound):
    """Block circulant with sizes. Leaf `c` (block rows, block columns, b).

    The product is by FFTs of length b in f32 for bf16 and f16 inputs, cast back.
    """

    last: ClassVar[str] = "c"
    grams: ClassVar[str] = "diagonal"

    @property
    def grid(self) -> tuple[int, int, int]:
        """(block rows, block columns, b)."""
        b = self.structure.block
        return self.d_in // b, self.d_out // b, b

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        axes = (first_axis(in_axes), first_axis(out_axes), None)
        return {"c": self.factor(self.grid, axes, self.d_in, self.d_out, share=1)}

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        rows, _, b = self.grid
        dtype = jnp.result_type(x, params["c"], jnp.float32)
        real = not jnp.issubdtype(dtype, jnp.complexfloating)
        forward, back = (jnp.fft.rfft, jnp.fft.irfft) if real else (jnp.fft.fft, jnp.fft.ifft)
        blocks = x.astype(dtype).reshape(-1, rows, b)
        spectrum = jnp.einsum("nkf,klf->nlf", by_rows(forward, blocks), by_rows(forward, params["c"].astype(dtype)))
        y = by_rows(lambda z: back(z, n=b), spectrum)
        return y.reshape(*x.shape[:-1], self.d_out).astype(jnp.result_type(x, params["c"]))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        flipped = jnp.roll(params["c"][..., ::-1], 1, axis=-1).swapaxes(0, 1)
        mirrored = BoundBlockCirculant(self.structure, self.out_shape, self.in_shape)
        return mirrored.matmul({"c": flipped}, y)

    def materialize(self, params: Params) -> jax.Array:
        return self.take(params, jnp.arange(self.d_in))

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        b = self.structure.block
        shift = (jnp.arange(b) - (ids % b)[..., None]) % b
        held = params["c"][ids // b]
        rows = jnp.take_along_axis(held, shift[..., None, :], axis=-1)
        return rows.reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum: the mean of each block's wrapped diagonals, weighted by a_i b_j under diagonal grams a, b.

        Diagonals without weight become zero. A full gram couples the diagonals and is refused.
        """
        self.check_dense(w)
        rows, columns, b = self.grid
        weight = lambda gram, size, what, blocks: (
            jnp.ones((blocks, b), w.real.dtype)
            if gram is None
            else (diagonal_roots(gram, size, what, self.structure.name)[0] ** 2).reshape(blocks, b)
        )
        left = weight(in_gram, self.d_in, "in_gram", rows)
        right = weight(out_gram, self.d_out, "out_gram", columns)
        i = jnp.arange(b)
        j = (i[:, None] + i) % b  # of diagonal d and row i: column (i + d) mod b
        entries = w.reshape(rows, b, columns, b)[:, i[None, :], :, j]  # (d, i, rows, columns)
        weights = left[:, i].T[None, :, :, None] * right.T[j][:, :, None, :]
        total = weights.sum(axis=1)
        mean = (weights * entries).sum(axis=1) / jnp.where(total > 0, total, 1)
        return {"c": jnp.where(total > 0, mean, 0).transpose(1, 2, 0).astype(w.dtype)}

    def _flops(self, rows: int) -> int:
        k, l, b = self.grid
        transforms = (
            fft_flops(rows * k, b, real=True) + fft_flops(k * l, b, real=True) + fft_flops(rows * l, b, real=True)
        )
        return transforms + 2 * rows * k * l * (b // 2 + 1)

    def _materialize_flops(self) -> int:
        return 0
