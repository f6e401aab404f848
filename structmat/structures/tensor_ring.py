"""Tensor ring (Zhao et al. 2016): a tensor train whose ends are joined, on paired input and output factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.descent import keep_better
from structmat.structures.factors import need_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.recipe import Structure
from structmat.structures.tensor import Cores, train_flops, train_matmul
from structmat.structures.tensor_ring_format import TensorRingFormat, enough_rank


@dataclasses.dataclass(frozen=True, repr=False)
class TensorRing(Structure):
    """`tensor_ring(rank, cores=3)`: paired factors of both sizes as a tensor train closed to a ring, all ranks equal.

    A side given as `cores` axes keeps them; any other is split as a whole into the most even factors >= 2, the input's
    descending and the output's ascending as in tensor_train. Every bond has rank `rank`, and the product costs `rank`
    times that of a tensor train: fewer parameters, not fewer operations. With two cores the class is
    kronecker(terms=rank^2).
    """

    rank: int | None = None
    cores: int = 3
    name: ClassVar[str] = "tensor_ring"
    about: ClassVar[About] = About(
        example="tensor_ring(rank=2)",
        formula="trace(G₁[i₁, j₁] ... G_c[i_c, j_c])",
        params="r² Σ n_k m_k",
        flops="2 r³ Σ (n / n₁...n_k) (m₁...m_k) n_k, as tensor_train r times",
        nearest="heuristic: TR-SVD, then ALS from several starts, monotone (optimal for 2 cores)",
        sharding="first core over n₁, m₁; else replicated",
        paper="Zhao et al. 2016",
        when="strongest compression with evenly used cores",
    )

    def check(self) -> None:
        self.need(rank=1, cores=2)

    def _modes(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, ...]:
        rows, columns = in_shape, out_shape
        if len(rows) != self.cores:
            rows = need_factors(math.prod(in_shape), self.cores, self.name, "d_in")
        if len(columns) != self.cores:
            columns = need_factors(math.prod(out_shape), self.cores, self.name, "d_out")[::-1]
        return tuple(zip(rows, columns))

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundTensorRing:
        self.required("rank")
        modes = self._modes(in_shape, out_shape)
        self.choose("rank", range(1, enough_rank(modes) + 1), in_shape, out_shape)
        return BoundTensorRing(self, in_shape, out_shape, TensorRingFormat.of(modes, self.rank))

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        most = enough_rank(self._modes(in_shape, out_shape))
        return [dataclasses.replace(self, rank=r) for r in range(1, most + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTensorRing(Bound):
    """Tensor ring with sizes. Leaves `core0`, `core1`, ... (r_k, n_k, m_k, r_{k+1})."""

    format: TensorRingFormat

    @property
    def _order(self) -> tuple[tuple[int, ...], bool]:
        """The cores in the order of application, and whether the ring is walked backwards: the cheapest start and sense."""
        count = len(self.format.modes)
        walks = [tuple((k + s * j) % count for j in range(count)) for s in (1, -1) for k in range(count)]
        flops = [_ring_flops([self._shape(k, i >= count) for k in walk]) for i, walk in enumerate(walks)]
        at = flops.index(min(flops))
        return walks[at], at >= count

    def _shape(self, k: int, backwards: bool) -> Shape:
        left, n, m, right = self.format.core_shapes[k]
        return (right, n, m, left) if backwards else (left, n, m, right)

    @property
    def last(self) -> str:
        """The core applied last."""
        return f"core{self._order[0][-1]}"

    @property
    def exact(self) -> bool:
        """Two cores are a matrix of rank r_0 r_1."""
        return len(self.format.modes) == 2

    def _cores(self, params: Params) -> list[jax.Array]:
        return [params[f"core{k}"] for k in range(len(self.format.modes))]

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        order, backwards = self._order
        leaves = {}
        for k, leaf in enumerate(self.format.core_shapes):
            left, n, m, right = self._shape(k, backwards)  # as the product meets it
            fan_in = n * (1 if k == order[0] else left) * (right if k == order[-1] else 1)
            fan_out = m * (1 if k == order[-1] else right) * (left if k == order[0] else 1)
            axes = (None, first_axis(in_axes), first_axis(out_axes), None) if k == 0 else (None,) * 4
            leaves[f"core{k}"] = self.factor(leaf, axes, fan_in, fan_out, len(order), fan_in // n)
        return leaves

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        order, backwards = self._order
        cores = [params[f"core{k}"].transpose(3, 1, 2, 0) if backwards else params[f"core{k}"] for k in order]
        state = x.reshape(-1, *(n for n, _ in self.format.modes)).transpose(0, *(1 + k for k in order))
        y = ring_matmul(cores, state.reshape(-1, self.d_in))
        y = y.reshape(-1, *(self.format.modes[k][1] for k in order))
        back = [1 + order.index(k) for k in range(len(order))]
        return y.transpose(0, *back).reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        count = len(self.format.modes)
        order = [2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]
        return self.format.materialize(self._cores(params)).transpose(order).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        at = jnp.unravel_index(ids.reshape(-1), [n for n, _ in self.format.modes])
        first, *middle, last = (core.transpose(1, 0, 2, 3)[i] for i, core in zip(at, self._cores(params)))
        state = first
        for rows in middle:
            state = jnp.einsum("izmr,irns->izmns", state, rows).reshape(*state.shape[:2], -1, rows.shape[-1])
        return jnp.einsum("izmr,irnz->imn", state, last).reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Alternating least squares from the TR-SVD, random starts (of `key`) and `like`: monotone, the
        best iterate, never worse than `like`; the optimum for two cores."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        modes = self.format.modes
        order = [axis for k in range(len(modes)) for axis in (k, len(modes) + k)]
        tensor = w.reshape([n for n, _ in modes] + [m for _, m in modes]).transpose(order)
        start = None if like is None else self._cores(like)
        params = {f"core{k}": c for k, c in enumerate(self.format.project(tensor, key=key, like=start))}
        return params if self.exact else keep_better(self, w, params, like)

    def _flops(self, rows: int) -> int:
        order, backwards = self._order
        return rows * _ring_flops([self._shape(k, backwards) for k in order])

    def _materialize_flops(self) -> int:
        return self.format.materialize_flops()


def ring_matmul(cores: Cores, x: jax.Array) -> jax.Array:
    """x `(rows, n_1...n_c)` times the ring of cores (r_k, n_k, m_k, r_{k+1}) -> `(rows, m_1...m_c)`: the sum over the
    closing rank of tensor trains."""
    one = lambda first, last: train_matmul([first[None], *cores[1:-1], last[..., None]], x)
    return jax.vmap(one, (0, 3))(cores[0], cores[-1]).sum(axis=0)


def _ring_flops(shapes: Sequence[Shape]) -> int:
    """FLOPs of `ring_matmul` per row."""
    first, *middle, last = shapes
    return first[0] * train_flops([(1, *first[1:]), *middle, (*last[:3], 1)], 1)
