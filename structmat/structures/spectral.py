"""Spectral: W = U diag(s) V^T with its singular values as a leaf of their own (SVFit trains only them)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import svd_of_product, truncated_svd, weighted_split
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Spectral(Structure):
    """`spectral(rank=None)`: `rank` triplets, all of them when None; parameters rank (d_in + d_out + 1).

    The output RMS at `spectral` init is that of low_rank: s starts at ones.
    """

    rank: int | None = None
    name: ClassVar[str] = "spectral"
    about: ClassVar[About] = About(
        example="spectral(rank=8)",
        formula="U diag(s) Vᵀ",
        params="r (n + m + 1)",
        flops="2 r (n + m) + r",
        nearest="optimal (SVD), any gram",
        sharding="as low_rank",
        paper="Sun et al. 2024 (SVFit); Zhao et al. 2024 (SST)",
        when="training or pruning singular values",
    )

    def check(self) -> None:
        self.need(rank=1)

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundSpectral:
        full = min(math.prod(in_shape), math.prod(out_shape))
        if self.rank is None:
            return BoundSpectral(dataclasses.replace(self, rank=full), in_shape, out_shape)
        self.choose("rank", range(1, full + 1), in_shape, out_shape)
        return BoundSpectral(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        full = min(math.prod(in_shape), math.prod(out_shape))
        return [dataclasses.replace(self, rank=r) for r in range(1, full + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundSpectral(Bound):
    """Spectral with sizes. Leaves `u` (r, d_in), `s` (r,), `v` (r, d_out)."""

    grams: ClassVar[str] = "full"

    @property
    def last(self) -> str:
        """The first trainable of s, v, u: a gain of 0 on it leaves it a gradient."""
        train = self.structure.train
        return next((n for n in ("s", "v", "u") if train is None or n in train), "s")

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        r = self.structure.rank
        return {
            "u": self.factor((r, self.d_in), ("rank", first_axis(in_axes)), self.d_in, r, share=3),
            "s": Leaf((r,), ("rank",), 1, 1, 1.0, law="ones", share=3, decay=False, mode=self.structure.init),
            "v": self.factor((r, self.d_out), ("rank", first_axis(out_axes)), r, self.d_out, share=3, embed_fan=r),
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return ((x @ params["u"].T) * params["s"]) @ params["v"]

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return ((y @ params["v"].T) * params["s"]) @ params["u"]

    def materialize(self, params: Params) -> jax.Array:
        return (params["u"].T * params["s"]) @ params["v"]

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        return (jnp.take(params["u"].T, ids, axis=0) * params["s"]) @ params["v"]

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Global optimum (Eckart-Young), with grams that of the whitened problem; u and v have orthonormal rows."""
        self.check_dense(w)
        if in_gram is None and out_gram is None:
            u, s, vt = truncated_svd(w, self.structure.rank)
        else:
            u, s, vt = svd_of_product(*weighted_split(w, self.structure.rank, in_gram, out_gram))
        return {"u": u.T.astype(w.dtype), "s": s.astype(jnp.finfo(w.dtype).dtype), "v": vt.astype(w.dtype)}

    def _flops(self, rows: int) -> int:
        r = self.structure.rank
        return 2 * rows * r * (self.d_in + self.d_out) + rows * r

    def _materialize_flops(self) -> int:
        r = self.structure.rank
        return self.d_in * r + 2 * self.d_in * r * self.d_out
