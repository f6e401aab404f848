"""Block-diagonal products on TPU: y = x W, and both gradients in one pass over x and dy.

Grid (groups of blocks, token tiles): the weights of a group stay in VMEM while tokens pass, and a step handles several
blocks, because it costs 500 to 800 cycles however little it does. Strips of x and y are addressed where they are, which
saves the transposes round a batched GEMM. Blocks narrower than the 128 lanes are laid side by side on the diagonal of
one that is not, in VMEM, once per group: the matrix unit is idle anyway where blocks are small. Zero times what is not
finite being NaN, such a value in x then reaches the outputs of all blocks joined with its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_diagonal.configs import Tiles


def forward(x: jax.Array, blocks: jax.Array, tiles: Tiles, interpret: object = False) -> jax.Array:
    """x (M, k p), blocks (k, p, s) -> (M, k s) in the dtype of x, summed in f32."""
    k, p, s = blocks.shape
    m, bm, group, join = x.shape[0], tiles.tokens, tiles.blocks, tiles.join

    def kernel(x_ref, w_ref, y_ref, *scratch):
        w_ref = _joined(w_ref, join, scratch)
        for g in range(group // join):
            y = _dot(x_ref[:, _lanes(g, join * p)], w_ref[g], (1, 0))
            y_ref[:, _lanes(g, join * s)] = y.astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, k * s), x.dtype),
        grid=(k // group, pl.cdiv(m, bm)),
        in_specs=[
            pl.BlockSpec((bm, group * p), lambda j, i: (i, j)),
            pl.BlockSpec((group, p, s), lambda j, i: (j, 0, 0)),
        ],
        out_specs=pl.BlockSpec((bm, group * s), lambda j, i: (i, j)),
        scratch_shapes=_scratch(tiles, p, s, blocks.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if join == 1 else "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * blocks.size,
            bytes_accessed=(x.size + m * k * s + blocks.size) * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="block_diagonal_forward",
        interpret=interpret,
    )(x, blocks)


def backward(
    x: jax.Array, dy: jax.Array, blocks: jax.Array, tiles: Tiles, interpret: object = False
) -> tuple[jax.Array, jax.Array]:
    """x (M, k p), dy (M, k s), blocks (k, p, s) -> dx (M, k p) and the gradient of the blocks, both summed in f32.

    M is a multiple of tiles.tokens. The gradient of a group of blocks stays in VMEM while tokens pass.
    """
    k, p, s = blocks.shape
    m, bm, group, join = x.shape[0], tiles.tokens, tiles.blocks, tiles.join
    wide, out_wide = join * p, join * s

    def kernel(x_ref, dy_ref, w_ref, dx_ref, dw_ref, total, *scratch):
        token = pl.program_id(1)
        w_ref = _joined(w_ref, join, scratch)

        @pl.when(token == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        for g in range(group // join):
            dy_g = dy_ref[:, _lanes(g, out_wide)]
            dx_ref[:, _lanes(g, wide)] = _dot(dy_g, w_ref[g], (1, 1)).astype(dx_ref.dtype)
            total[g] += _dot(x_ref[:, _lanes(g, wide)], dy_g, (0, 0))

        @pl.when(token == pl.num_programs(1) - 1)
        def _():
            for g in range(group):
                dw_ref[g] = total[_place(g, join, p, s)].astype(dw_ref.dtype)

    strip = lambda width: pl.BlockSpec((bm, group * width), lambda j, i: (i, j))
    weights = pl.BlockSpec((group, p, s), lambda j, i: (j, 0, 0))
    return pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(blocks.shape, blocks.dtype)),
        grid=(k // group, m // bm),
        in_specs=[strip(p), strip(s), weights],
        out_specs=(strip(p), weights),
        scratch_shapes=[
            pltpu.VMEM((group // join, wide, out_wide), jnp.float32),
            *_scratch(tiles, p, s, blocks.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * blocks.size,
            bytes_accessed=(2 * x.size + dy.size + 2 * blocks.size) * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="block_diagonal_backward",
        interpret=interpret,
    )(x, dy, blocks)


def _scratch(tiles: Tiles, p: int, s: int, dtype: Any) -> list[Any]:
    """Room for the joined blocks of a group, where blocks are joined."""
    shape = tiles.blocks // tiles.join, tiles.join * p, tiles.join * s
    return [pltpu.VMEM(shape, dtype)] if tiles.join > 1 else []


def _joined(w_ref: Any, join: int, scratch: tuple[Any, ...]) -> Any:
    """Blocks (G, p, s), or their joins (G / join, join p, join s) in scratch, made at the first token tile."""
    if join == 1:
        return w_ref
    (whole,), (group, p, s) = scratch, w_ref.shape

    @pl.when(pl.program_id(1) == 0)
    def _():
        whole[...] = jnp.zeros_like(whole)
        for g in range(group):
            whole[_place(g, join, p, s)] = w_ref[g]

    return whole


def _place(g: int, join: int, p: int, s: int) -> tuple[Any, ...]:
    """Where block g lies among the joined ones."""
    j = g % join
    return g // join, pl.ds(j * p, p), pl.ds(j * s, s)


def _lanes(g: int, width: int) -> Any:
    return pl.ds(g * width, width)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The product over one axis of each, in f32."""
    over = (contracted[:1], contracted[1:]), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=jnp.float32)
