"""BTT-MoE: a block tensor train whose rank index is a set of experts, a few of which each input is sent to.

Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices", NeurIPS 2024,
arXiv 2410.02117. Not a matrix: which experts act depends on the input.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.base import Bound
from structmat.structures.block_low_rank import BoundBlockLowRank
from structmat.structures.block_tensor_train import BlockTensorTrain
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Axes, Cost, Leaves, Params, Shape, first_axis
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class BttMoe(Structure):
    """`btt_moe(experts, active=2, balance=0.01)`: y = sum over the `active` experts e of largest x gate_e of
    g_e (x R_e) L_e, with g the softmax over these logits and (R_e, L_e) two-core block tensor trains of rank 1.

    In training `balance` times [E sum_e p_e f_e + 0.1 mean(logsumexp(x gate)^2)] is added to the loss, p the mean softmax
    over all experts and f the share of inputs sent to each; the factor is our choice, the paper's is not known to us. The
    term is kept as a whole weight, as a term of a sum, in `weight_norm` (which leaves the gate as it is) and in
    `fake_quantized`; elsewhere it is refused. The gate starts at zero, so that the first experts take everything until that
    term spreads it. FLOPs are those of the active experts and the gate; all experts are computed, as in the paper's code,
    and the others' part thrown away.
    """

    experts: int | None = None
    active: int = 2
    balance: float = 0.01
    name: ClassVar[str] = "btt_moe"

    @property
    def has_auxiliary(self) -> bool:
        return self.balance > 0

    def check(self) -> None:
        self.need(experts=1, active=1)
        if self.experts is not None and self.active > self.experts:
            raise StructureError(f"btt_moe: active={self.active} must be at most experts={self.experts}")
        if not self.balance >= 0:
            raise StructureError(f"btt_moe: balance must not be negative, got {self.balance}")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundBttMoe:
        self.required("experts")
        one = BlockTensorTrain(rank=1, order="blocked", init=self.init).bind(in_shape, out_shape)
        return BoundBttMoe(self, in_shape, out_shape, one)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """With experts left open, every number from `active` to as many as the slices have ranks."""
        if self.experts is not None:
            return []
        full = BlockTensorTrain(order="blocked").candidates(in_shape, out_shape)
        return [dataclasses.replace(self, experts=e) for e in range(self.active, len(full) + 1)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBttMoe(Bound):
    """BTT-MoE with sizes: leaves `R` (k, p, l, E) and `L` (l, k, E, s), as a block tensor train of rank E has, and `gate`
    (d_in, E)."""

    one: BoundBlockLowRank

    exact: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False
    may_densify: ClassVar[bool] = False
    last: ClassVar[str] = "L"

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        """Every expert starts, and learns, as a block tensor train of rank 1."""
        experts, (k, p, l, s, _) = self.structure.experts, self.one.sizes
        found = self.one._leaves(in_axes, out_axes)
        gate = self.factor(
            (self.d_in, experts),
            (first_axis(in_axes), None),
            self.d_in,
            experts,
            share=1,
            std=0.0,
            embed_fan=1,
            capped=False,
        )
        return {
            "R": dataclasses.replace(found["R"], shape=(k, p, l, experts)),
            "L": dataclasses.replace(found["L"], shape=(l, k, experts, s)),
            "gate": gate,
        }

    def route(self, logits: jax.Array) -> jax.Array:
        """Weights f32 (..., E) of the experts: the softmax over the `active` largest logits, 0 for the others."""
        top, index = lax.top_k(logits, self.structure.active)
        return jnp.sum(jax.nn.one_hot(index, logits.shape[-1]) * jax.nn.softmax(top)[..., None], axis=-2)

    def _logits(self, params: Params, x: jax.Array) -> jax.Array:
        return (x @ params["gate"]).astype(jnp.float32)

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        """One expert after another: all at once, what lies between the cores is E times as large. It is formed again for the
        gradients for the same reason."""
        weights = self.route(self._logits(params, x)).astype(x.dtype)
        right, left = jnp.moveaxis(params["R"], 3, 0)[..., None], jnp.moveaxis(params["L"], 2, 0)[:, :, :, None]

        @jax.checkpoint
        def add(y: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            own, gate = {"R": expert[0], "L": expert[1]}, expert[2]
            return y + self.one.matmul(own, x * gate[..., None]), None

        start = jnp.zeros((*x.shape[:-1], self.d_out), jnp.result_type(x, right))
        return lax.scan(add, start, (right, left, jnp.moveaxis(weights, -1, 0)))[0]

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        """The output for one-hot inputs."""
        _, p, l, _, _ = self.one.sizes
        weights = self.route(params["gate"][ids].astype(jnp.float32)).astype(params["R"].dtype)
        right = params["R"].reshape(self.d_in, l, -1)[ids] * weights[..., None, :]
        left = params["L"].transpose(1, 0, 2, 3)[ids // p]
        return jnp.einsum("...le,...les->...ls", right, left).reshape(*ids.shape, self.d_out)

    def auxiliary(self, params: Params, x: jax.Array) -> jax.Array | None:
        """The balance term over all rows of x `(..., d_in)`; None where `balance` is 0."""
        own = self.structure
        if not own.has_auxiliary:
            return None
        logits = self._logits(params, x).reshape(-1, own.experts)
        sent = jnp.mean(self.route(logits) > 0, axis=0) / own.active
        spread = own.experts * jnp.sum(jnp.mean(jax.nn.softmax(logits), axis=0) * lax.stop_gradient(sent))
        return own.balance * (spread + 0.1 * jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1))))

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        self._refuse("transpose")

    def materialize(self, params: Params) -> jax.Array:
        self._refuse("dense form")

    def project(self, w: jax.Array, **unused: Any) -> dict[str, Any]:
        """Refused; `block_tensor_train` is the linear form that projects."""
        self._refuse("nearest member to a dense matrix; block_tensor_train has one")

    def _refuse(self, what: str) -> NoReturn:
        raise StructureError(f"{self.structure.short()} is not a matrix: it has no {what}")

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """As of any structure; executed are all experts."""
        found, own = super().cost(rows, dtype, "factored"), self.structure
        return dataclasses.replace(
            found, flops_executed=found.flops + (own.experts - own.active) * self.one._flops(rows)
        )

    def _flops(self, rows: int) -> int:
        own = self.structure
        return own.active * self.one._flops(rows) + 2 * rows * self.d_in * own.experts

    def _materialize_flops(self) -> int:
        return 2 * math.prod((self.d_in, self.d_out, self.structure.experts))
