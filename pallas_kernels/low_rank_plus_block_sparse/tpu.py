"""Low rank plus block sparse on TPU: y = (x a^T) b + x S and dx = (dy b^T) a + dy S^T, each in one pass.

a (r, K) and b (r, N) have the rank first, as narrow arrays want it; S is values (C, R, p, s) and index (C R,), the block
row of each, as in block_sparse. The narrow product h is made at the first column group of a token tile and stays in VMEM
while columns pass, so that x is read once and y written once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse.configs import Tiles
from pallas_kernels.block_sparse.tpu import repeat, unrolled


def forward(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    values: jax.Array,
    index: jax.Array,
    tiles: Tiles,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """x (M, K) -> y (M, N) and h = x a^T (M, r), both in the dtype of x and summed in f32."""
    (m, k), rank = x.shape, a.shape[0]
    columns, count, p, s = values.shape
    bm, group = tiles.tokens, tiles.columns
    stretch, together = unrolled(count, bm, p, s), unrolled(group, bm * count, p, s)

    def kernel(row_of, x_ref, a_ref, b_ref, w_ref, y_ref, h_ref):
        first = pl.program_id(1) * group * count

        @pl.when(pl.program_id(1) == 0)
        def _():
            def narrow(c: Any, total: jax.Array) -> jax.Array:
                at = _lanes(c, p)
                return total + _dot(x_ref[:, at], a_ref[:, at], (1, 1))

            h = repeat(k // p, unrolled(k // p, bm, p, rank), narrow, jnp.zeros((bm, rank), jnp.float32))
            h_ref[...] = h.astype(h_ref.dtype)

        def column(g: Any, _: int) -> int:
            def block(r: Any, total: jax.Array) -> jax.Array:
                row = pl.multiple_of(row_of[first + g * count + r] * p, p)
                return total + _dot(x_ref[:, pl.ds(row, p)], w_ref[g, r], (1, 0))

            at = _lanes(g, s)
            total = repeat(count, stretch, block, _dot(h_ref[...], b_ref[:, at], (1, 0)))
            y_ref[:, at] = total.astype(y_ref.dtype)
            return 0

        repeat(group, together, column, 0)

    return pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((m, columns * s), x.dtype), jax.ShapeDtypeStruct((m, rank), x.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, bm), columns // group),
            in_specs=[pl.BlockSpec((bm, k), lambda i, j, _: (i, 0)), *_factors(a, values, group)],
            out_specs=(
                pl.BlockSpec((bm, group * s), lambda i, j, _: (i, j)),
                pl.BlockSpec((bm, rank), lambda i, j, _: (i, 0)),
            ),
        ),
        compiler_params=_parameters(tiles),
        cost_estimate=_cost(m, a, b, values),
        name="low_rank_plus_block_sparse_forward",
        interpret=interpret,
    )(index, x, a, b, values)


def backward_x(
    dy: jax.Array,
    a: jax.Array,
    b: jax.Array,
    values: jax.Array,
    index: jax.Array,
    tiles: Tiles,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """dy (M, N) -> dx (M, K) and dh = dy b^T (M, r), both in the dtype of dy and summed in f32.

    Every block adds into its lanes of a panel (tokens, K) that stays in VMEM; dh a joins it at the last column group.
    """
    m, (rank, k) = dy.shape[0], a.shape
    columns, count, p, s = values.shape
    bm, group = tiles.tokens, tiles.columns
    stretch, together = unrolled(count, bm, p, s), unrolled(group, bm * count, p, s)

    def kernel(row_of, dy_ref, a_ref, b_ref, w_ref, dx_ref, dh_ref, total, narrow):
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)
            narrow[...] = jnp.zeros_like(narrow)

        narrow[...] += _dot(dy_ref[...], b_ref[...], (1, 1))

        def column(g: Any, _: int) -> int:
            part = dy_ref[:, _lanes(g, s)]

            def add(r: Any, _: int) -> int:
                row = pl.multiple_of(row_of[(step * group + g) * count + r] * p, p)
                total[:, pl.ds(row, p)] += _dot(part, w_ref[g, r], (1, 1))
                return 0

            return repeat(count, stretch, add, 0)

        repeat(group, together, column, 0)

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            dh_ref[...] = narrow[...].astype(dh_ref.dtype)

            def widen(c: Any, _: int) -> int:
                at = _lanes(c, p)
                dx_ref[:, at] = (total[:, at] + _dot(dh_ref[...], a_ref[:, at], (1, 0))).astype(dx_ref.dtype)
                return 0

            repeat(k // p, unrolled(k // p, bm, p, rank), widen, 0)

    return pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((m, k), dy.dtype), jax.ShapeDtypeStruct((m, rank), dy.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, bm), columns // group),
            in_specs=[pl.BlockSpec((bm, group * s), lambda i, j, _: (i, j)), *_factors(a, values, group)],
            out_specs=(
                pl.BlockSpec((bm, k), lambda i, j, _: (i, 0)),
                pl.BlockSpec((bm, rank), lambda i, j, _: (i, 0)),
            ),
            scratch_shapes=[pltpu.VMEM((bm, k), jnp.float32), pltpu.VMEM((bm, rank), jnp.float32)],
        ),
        compiler_params=_parameters(tiles),
        cost_estimate=_cost(m, a, b, values),
        name="low_rank_plus_block_sparse_backward_x",
        interpret=interpret,
    )(index, dy, a, b, values)


def _factors(a: jax.Array, values: jax.Array, group: int) -> list[Any]:
    """Blocks of a, b and values in one step: all of a, and `group` block columns of the others."""
    rank, (_, count, p, s) = a.shape[0], values.shape
    return [
        pl.BlockSpec(a.shape, lambda i, j, _: (0, 0)),
        pl.BlockSpec((rank, group * s), lambda i, j, _: (0, j)),
        pl.BlockSpec((group, count, p, s), lambda i, j, _: (j, 0, 0, 0)),
    ]


def _lanes(c: Any, width: int) -> Any:
    return pl.ds(pl.multiple_of(c * width, width), width)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, in f32."""
    over = (contracted[:1], contracted[1:]), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=jnp.float32)


def _parameters(tiles: Tiles) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem)


def _cost(m: int, a: jax.Array, b: jax.Array, values: jax.Array) -> pl.CostEstimate:
    weights = a.size + b.size + values.size
    moved = m * (a.shape[0] + a.shape[1] + b.shape[1]) + weights
    return pl.CostEstimate(flops=2 * m * weights, bytes_accessed=moved * a.dtype.itemsize, transcendentals=0)
