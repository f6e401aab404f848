"""Blocked-ELL products on TPU: y = x W, x' = y W^T, and the gradient of the stored blocks.

values (C, R, p, s) and index (C R,), the block row of each, stand for W (K, N) of C block columns with R blocks each. A
grid step handles G block columns at once, because a step costs 500 to 800 cycles however little it does; p and s are
multiples of the 128 lanes, because blocks are addressed by dynamic lane slices of panels that stay in VMEM.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse.configs import Tiles

BODY = 16384 * 128 * 128
"""Multiply-adds of one basic block: several dots for the scheduler to overlap, few enough to compile in seconds (a body
four times as large took minutes)."""


def forward(x: jax.Array, values: jax.Array, index: jax.Array, tiles: Tiles, interpret: object = False) -> jax.Array:
    """x (M, K) -> (M, N), accumulated in f32; grid (token tiles, column groups), the x panel stays while columns pass."""
    m, k = x.shape
    columns, count, p, s = values.shape
    bm, group = tiles.tokens, tiles.columns
    stretch = unrolled(count, bm, p, s)
    together = unrolled(group, bm * count, p, s)

    def kernel(row_of, x_ref, w_ref, y_ref):
        first = pl.program_id(1) * group * count

        def column(g: jax.Array, _: int) -> int:
            def dot(i: jax.Array | int, total: jax.Array) -> jax.Array:
                slots = [i * stretch + r for r in range(stretch)]
                strip = gathered(x_ref, [row_of[first + g * count + r] * p for r in slots], p)
                weight = jnp.concatenate([w_ref[g, r] for r in slots], axis=0)
                return total + jnp.dot(strip, weight, preferred_element_type=jnp.float32)

            total = repeat(count // stretch, 1, dot, jnp.zeros((bm, s), jnp.float32))
            y_ref[:, pl.ds(pl.multiple_of(g * s, s), s)] = total.astype(y_ref.dtype)
            return 0

        repeat(group, together, column, 0)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, columns * s), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, bm), columns // group),
            in_specs=[
                pl.BlockSpec((bm, k), lambda i, j, _: (i, 0)),
                pl.BlockSpec((group, count, p, s), lambda i, j, _: (j, 0, 0, 0)),
            ],
            out_specs=pl.BlockSpec((bm, group * s), lambda i, j, _: (i, j)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=_cost(x, values, columns * s),
        name="block_sparse_forward",
        interpret=interpret,
    )(index, x, values)


def backward_x(
    dy: jax.Array, values: jax.Array, index: jax.Array, k: int, tiles: Tiles, interpret: object = False
) -> jax.Array:
    """dy (M, N) -> dy W^T (M, K): every block adds into its lanes of a panel (tokens, K) that stays in VMEM.

    Adding in place needs no transposed list, which for random supports would be ragged.
    """
    m = dy.shape[0]
    columns, count, p, s = values.shape
    bm, group = tiles.tokens, tiles.columns
    stretch = unrolled(count, bm, p, s)
    together = unrolled(group, bm * count, p, s)

    def kernel(row_of, dy_ref, w_ref, dx_ref, total):
        step = pl.program_id(1)

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        def column(g: jax.Array, _: int) -> int:
            part = dy_ref[:, pl.ds(pl.multiple_of(g * s, s), s)]

            def add(i: jax.Array | int, _: int) -> int:
                slots = [i * stretch + r for r in range(stretch)]
                for r in slots:
                    row = pl.multiple_of(row_of[(step * group + g) * count + r] * p, p)
                    total[:, pl.ds(row, p)] += lax.dot_general(
                        part, w_ref[g, r], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                    )
                return 0

            return repeat(count // stretch, 1, add, 0)

        repeat(group, together, column, 0)

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            dx_ref[...] = total[...].astype(dx_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, k), dy.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, bm), columns // group),
            in_specs=[
                pl.BlockSpec((bm, group * s), lambda i, j, _: (i, j)),
                pl.BlockSpec((group, count, p, s), lambda i, j, _: (j, 0, 0, 0)),
            ],
            out_specs=pl.BlockSpec((bm, k), lambda i, j, _: (i, 0)),
            scratch_shapes=[pltpu.VMEM((bm, k), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=_cost(dy, values, k),
        name="block_sparse_backward_x",
        interpret=interpret,
    )(index, dy, values)


def backward_values(
    x: jax.Array,
    dy: jax.Array,
    index: jax.Array,
    grid: tuple[int, int, int, int],
    tiles: Tiles,
    interpret: object = False,
) -> jax.Array:
    """x (M, K), dy (M, N) -> (C, R, p, s): the entries of x^T dy on the support; M is a multiple of tiles.tokens.

    Token tiles pass inside while the f32 sums of a column group stay in VMEM, so x is read once per column group.
    """
    m, k = x.shape
    columns, count, p, s = grid
    bm, group = tiles.tokens, tiles.columns
    stretch = unrolled(count, bm, p, s)
    together = unrolled(group, bm * count, p, s)

    def kernel(row_of, x_ref, dy_ref, dw_ref, sums):
        group_at, token = pl.program_id(0), pl.program_id(1)

        @pl.when(token == 0)
        def _():
            sums[...] = jnp.zeros_like(sums)

        def column(g: jax.Array, _: int) -> int:
            part = dy_ref[:, pl.ds(pl.multiple_of(g * s, s), s)]

            def add(i: jax.Array | int, _: int) -> int:
                slots = [i * stretch + r for r in range(stretch)]
                strip = gathered(x_ref, [row_of[(group_at * group + g) * count + r] * p for r in slots], p)
                parts = lax.dot_general(strip, part, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
                for q, r in enumerate(slots):
                    sums[g, r] += parts[q * p : (q + 1) * p]
                return 0

            return repeat(count // stretch, 1, add, 0)

        repeat(group, together, column, 0)

        @pl.when(token == pl.num_programs(1) - 1)
        def _():
            dw_ref[...] = sums[...].astype(dw_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((columns, count, p, s), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns // group, m // bm),
            in_specs=[
                pl.BlockSpec((bm, k), lambda j, i, _: (i, 0)),
                pl.BlockSpec((bm, group * s), lambda j, i, _: (i, j)),
            ],
            out_specs=pl.BlockSpec((group, count, p, s), lambda j, i, _: (j, 0, 0, 0)),
            scratch_shapes=[pltpu.VMEM((group, count, p, s), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * columns * count * p * s,
            bytes_accessed=x.size * x.dtype.itemsize * (columns // group)
            + dy.size * dy.dtype.itemsize
            + columns * count * p * s * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="block_sparse_backward_values",
        interpret=interpret,
    )(index, x, dy)


def gathered(panel: Any, starts: list[jax.Array], width: int) -> jax.Array:
    """The lanes of a panel (tokens, K) from every start on, side by side: one deep GEMM instead of several shallow ones."""
    return jnp.concatenate([panel[:, pl.ds(pl.multiple_of(at, width), width)] for at in starts], axis=1)


def repeat(count: int, stretch: int, step: Any, carry: Any) -> Any:
    """Fold `step(r, carry)` over r: `stretch` of them unrolled, in a loop where there are more."""

    def body(i: jax.Array | int, carry: Any) -> Any:
        for r in range(stretch):
            carry = step(i * stretch + r, carry)
        return carry

    return body(0, carry) if stretch == count else lax.fori_loop(0, count // stretch, body, carry)


def unrolled(count: int, tokens: int, p: int, s: int) -> int:
    """How many of `count` dots (tokens, p) x (p, s) one basic block holds: a divisor of it."""
    most = max(1, BODY // (tokens * p * s))
    return max(d for d in range(1, min(count, most) + 1) if count % d == 0)


def _cost(x: jax.Array, values: jax.Array, out: int) -> pl.CostEstimate:
    m, size = x.shape[0], x.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * m * values.size,
        bytes_accessed=(x.size + m * out) * size + values.size * values.dtype.itemsize,
        transcendentals=0,
    )
