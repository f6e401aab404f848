"""LOST: a nonlinear low-rank branch beside a few whole input channels, both cut from one dense matrix.

Li et al. 2025, "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668. Not a matrix, unless
the activation is the identity.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NoReturn

import jax
import jax.numpy as jnp

from pallas_kernels.low_rank import low_rank
from structmat.structures.base import Bound
from structmat.structures.bottleneck import ACTIVATIONS
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import working_dtype
from structmat.structures.random_sparse import draw_rows
from structmat.structures.recipe import Structure

ACTIVATION = {"identity": lambda h: h} | ACTIVATIONS


@dataclasses.dataclass(frozen=True, repr=False)
class Lost(Structure):
    """`lost(rank, density)`: y = gamma activation(x A) B + (1 - gamma) x[..., index] V, k = round(density d_in) channels.

    At initialisation a dense W0 is drawn and split by its SVD: A = U_r S_r^(1/2) and B = S_r^(1/2) V_r^T, the k rows (input
    channels) of largest norm in what the top r triplets leave are `index`, and V are those rows of W0 (`values='dense'`)
    or of that remainder (`'residual'`). `channels='random'` draws the index instead, and `factors='random'` starts A and B
    as a low-rank layer: the ablations of the method's parts. gamma is a constant, and nothing makes up for it, so the
    output starts smaller than that of W0. The paper's own gamma and activation are not known to us: SiLU is that of CoLA,
    0.7 our choice.
    """

    rank: int | None = None
    density: float | None = None
    gamma: float = 0.7
    activation: Literal["identity", "silu", "relu", "gelu", "tanh"] = "silu"
    values: Literal["dense", "residual"] = "dense"
    channels: Literal["norm", "random"] = "norm"
    factors: Literal["svd", "random"] = "svd"
    name: ClassVar[str] = "lost"

    def check(self) -> None:
        self.need(rank=1)
        if self.density is not None and not 0 < self.density <= 1:
            raise StructureError(f"lost: density must be in (0, 1], got {self.density}")
        if not 0 < self.gamma < 1:
            raise StructureError(f"lost: gamma must be in (0, 1), got {self.gamma}")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundLost:
        self.required("rank", "density")
        d_in, full = math.prod(in_shape), min(math.prod(in_shape), math.prod(out_shape))
        self.choose("rank", range(1, full + 1), in_shape, out_shape)
        if round(self.density * d_in) < 1:
            raise StructureError(
                f"lost: density={self.density} leaves none of {d_in} channels; smallest density is {1 / d_in:.6g}"
            )
        return BoundLost(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """With the density given, every rank."""
        if self.rank is not None or self.density is None:
            return []
        full = min(math.prod(in_shape), math.prod(out_shape))
        return [dataclasses.replace(self, rank=r) for r in range(1, full + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundLost(Bound):
    """LOST with sizes: leaves `a` (r, d_in), `b` (r, d_out), `values` (k, d_out) and the frozen int32 `index` (k,), ascending."""

    exact: ClassVar[bool] = False
    last: ClassVar[str] = "b"

    @property
    def is_linear(self) -> bool:
        return self.structure.activation == "identity"

    @property
    def count(self) -> int:
        """Channels kept."""
        return round(self.structure.density * self.d_in)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        r, k = self.structure.rank, self.count
        law = {"law": "derived"} if self.structure.factors == "svd" else {}
        out = first_axis(out_axes)
        return {
            "a": self.factor((r, self.d_in), ("rank", first_axis(in_axes)), self.d_in, r, share=4, **law),
            "b": self.factor((r, self.d_out), ("rank", out), r, self.d_out, share=4, embed_fan=r, **law),
            "values": self.factor((k, self.d_out), (None, out), k, self.d_out, share=2, law="derived"),
            "index": Leaf((k,), (None,), 1, 1, 1.0, law="index", dtype=jnp.int32, trainable=False, decay=False),
        }

    def leaves(self, in_axes: Axes = None, out_axes: Axes = None, gain: float = 1.0) -> Leaves:
        """As of any structure; a gain acts on both branches."""
        found = dict(super().leaves(in_axes, out_axes))
        for name in ("b", "values"):
            found[name] = dataclasses.replace(found[name], std=found[name].std * gain)
        return found

    def init(self, key: jax.Array, dtype: Any = jnp.float32, gain: float = 1.0) -> dict[str, Any]:
        """Both branches from one dense matrix of the recipe's `init`."""
        own, (draw, pick, ka, kb) = self.structure, jax.random.split(key, 4)
        dense = self.factor((self.d_in, self.d_out), (None, None), self.d_in, self.d_out, share=1)
        w = self._sample("dense", dense, draw, working_dtype(jnp.zeros((), dtype)))
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        root = jnp.sqrt(s[: own.rank])
        a, b = (u[:, : own.rank] * root).T, root[:, None] * vt[: own.rank]
        rest = w - a.T @ b
        if own.channels == "norm":
            _, index = jax.lax.top_k(jnp.linalg.norm(rest, axis=1), self.count)
        else:
            index = draw_rows(pick, 1, self.d_in, self.count)[0]
        index = jnp.sort(index).astype(jnp.int32)
        values = jnp.take(w if own.values == "dense" else rest, index, axis=0)
        if own.factors == "random":
            leaves = self._leaves(None, None)
            a, b = (self._sample(n, leaves[n], k, w.dtype) for n, k in (("a", ka), ("b", kb)))
        return {
            "a": a.astype(dtype),
            "b": (gain * b).astype(dtype),
            "values": (gain * values).astype(dtype),
            "index": index,
        }

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        own = self.structure
        if own.activation == "identity":
            branch = low_rank(x, params["a"], params["b"])
        else:
            branch = ACTIVATION[own.activation](x @ params["a"].T) @ params["b"]
        return own.gamma * branch + (1 - own.gamma) * (jnp.take(x, params["index"], axis=-1) @ params["values"])

    def materialize(self, params: Params) -> jax.Array:
        """With activation='identity'; else StructureError."""
        self._need_linear("dense form")
        own = self.structure
        w = own.gamma * (params["a"].T @ params["b"])
        return w.at[params["index"]].add((1 - own.gamma) * params["values"])

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        self._need_linear("transpose")
        return super().rmatmul(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """The output for one-hot inputs."""
        own = self.structure
        branch = ACTIVATION[own.activation](jnp.take(params["a"].T, ids, axis=0)) @ params["b"]
        sparse = jnp.zeros((self.d_in, self.d_out), branch.dtype).at[params["index"]].set(params["values"])
        return own.gamma * branch + (1 - own.gamma) * jnp.take(sparse, ids, axis=0)

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """Refused; `low_rank(rank) + channel_sparse(density, select='norm')` is the linear form that projects."""
        self._refuse("nearest member to a dense matrix; low_rank + channel_sparse(select='norm') has one")

    def _need_linear(self, what: str) -> None:
        if not self.is_linear:
            self._refuse(what)

    def _refuse(self, what: str) -> NoReturn:
        raise StructureError(f"{self.structure.short()} is not a matrix: it has no {what}")

    def _flops(self, rows: int) -> int:
        return 2 * rows * (self.structure.rank * (self.d_in + self.d_out) + self.count * self.d_out)

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * self.structure.rank * self.d_out
