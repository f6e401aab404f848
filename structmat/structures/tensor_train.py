"""TT-matrix (Oseledets 2011; Novikov et al. 2015): the tensor of paired input and output factors as a tensor train."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.descent import keep_better
from structmat.structures.factors import need_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.recipe import Structure
from structmat.structures.tensor import TensorTrainFormat, maximal_ranks, train_flops, train_matmul


@dataclasses.dataclass(frozen=True, repr=False)
class TensorTrain(Structure):
    """`tensor_train(rank, cores=2)`: both sizes split into `cores` factors >= 2, interior ranks min(rank, maximal).

    Splits are the most even ones, input factors descending and output factors ascending: that balances the cores and
    makes contraction from the left the cheapest. With two cores the class is kronecker(terms=rank).
    """

    rank: int | None = None
    cores: int = 2
    name: ClassVar[str] = "tensor_train"
    about: ClassVar[About] = About(
        example="tensor_train(rank=4, cores=3)",
        formula="chain of c cores (r, nₖ, mₖ, r)",
        params="Σ rₖ₋₁ nₖ mₖ rₖ",
        flops="Σ of core products",
        nearest="optimal (2 cores), else within √(c-1) (TT-SVD)",
        sharding="first core over n and m, the others whole",
        paper="Oseledets 2011; Novikov et al. 2015",
        when="extreme compression of large matrices",
    )

    def check(self) -> None:
        self.need(rank=1, cores=2)

    def _modes(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, ...]:
        rows = need_factors(math.prod(in_shape), self.cores, self.name, "d_in")
        columns = need_factors(math.prod(out_shape), self.cores, self.name, "d_out")
        return tuple(zip(rows, reversed(columns)))

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundTensorTrain:
        self.required("rank")
        modes = self._modes(in_shape, out_shape)
        self.choose("rank", range(1, max(maximal_ranks(modes)) + 1), in_shape, out_shape)
        return BoundTensorTrain(self, in_shape, out_shape, TensorTrainFormat.of(modes, self.rank))

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        most = max(maximal_ranks(self._modes(in_shape, out_shape)))
        return [dataclasses.replace(self, rank=r) for r in range(1, most + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundTensorTrain(Bound):
    """TT-matrix with sizes. Leaves `core0`, `core1`, ... (r_{k-1}, n_k, m_k, r_k)."""

    format: TensorTrainFormat

    @property
    def last(self) -> str:
        """The core applied last."""
        return f"core{len(self.format.modes) - 1}"

    @property
    def exact(self) -> bool:
        """TT-SVD is the optimum for two cores."""
        return len(self.format.modes) == 2

    def _cores(self, params: Params) -> list[jax.Array]:
        return [params[f"core{k}"] for k in range(len(self.format.modes))]

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        shapes, leaves = self.format.core_shapes, {}
        for k, (left, n, m, right) in enumerate(shapes):
            axes = (None, first_axis(in_axes), first_axis(out_axes), "rank") if k == 0 else ("rank", None, None, None)
            leaves[f"core{k}"] = self.factor(
                (left, n, m, right), axes, left * n, m * right, share=len(shapes), embed_fan=left
            )
        return leaves

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        y = train_matmul(self._cores(params), x.reshape(-1, self.d_in))
        return y.reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        count = len(self.format.modes)
        order = [2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]
        return self.format.materialize(self._cores(params)).transpose(order).reshape(self.d_in, self.d_out)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        flat = ids.reshape(-1)
        at = jnp.unravel_index(flat, [n for n, _ in self.format.modes])
        state = jnp.ones((flat.size, 1, 1), params["core0"].dtype)
        for index, core in zip(at, self._cores(params)):
            rows = core.transpose(1, 0, 2, 3)[index]
            state = jnp.einsum("ijr,irms->ijms", state, rows).reshape(flat.size, -1, core.shape[-1])
        return state.reshape(*ids.shape, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """TT-SVD: the global optimum for two cores, within sqrt(cores - 1) of it for more; `like` if that is nearer."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        modes = self.format.modes
        order = [axis for k in range(len(modes)) for axis in (k, len(modes) + k)]
        tensor = w.reshape([n for n, _ in modes] + [m for _, m in modes]).transpose(order)
        params = {f"core{k}": core for k, core in enumerate(self.format.project(tensor))}
        return params if self.exact else keep_better(self, w, params, like)

    def _flops(self, rows: int) -> int:
        return train_flops(self.format.core_shapes, rows)

    def _materialize_flops(self) -> int:
        return self.format.materialize_flops()
