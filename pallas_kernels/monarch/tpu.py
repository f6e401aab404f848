"""The two-stage product of a block-low-rank matrix on TPU, with nothing between the stages leaving VMEM.

W (k p, l s) is right (k, p, l r) and left (l, k r, s): y_j = sum_i (x_i right_i[:, j]) left_j[i]. Output block j reads the
columns j of every right block and left block j alone, so blocks of columns are independent. Per output block the rank
groups of all input blocks are gathered in VMEM into one narrow matrix Z (tokens, k r), which makes the second stage one
GEMM with k r deep contractions; groups of 128 lanes and more land there by plain stores, narrower ones are joined first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.monarch.configs import Tiles
from pallas_kernels.tiling import LANES

CHUNK = 256
"""Columns of y computed by one dot: keeps bodies short enough to compile in seconds."""


def forward(
    x: jax.Array, right: jax.Array, left: jax.Array, tiles: Tiles, interpret: object = False, transposed: bool = False
) -> jax.Array:
    """x (M, k p), right (k, p, l r), left (l, k r, s) -> (M, l s); sums in f32, Z in the dtype of x.

    `transposed`: dy (M, l s) -> dy W^T (M, k p) by the same two stages in the opposite order, the operands as they are.

    Grid (groups of output blocks, token tiles): the weights of a group stay while tokens pass.
    """
    (k, p, lr), (l, kr, s) = right.shape, left.shape
    r, m, bm, group = lr // l, x.shape[0], tiles.tokens, tiles.blocks
    ins, width, outs, out_width = (l, s, k, p) if transposed else (k, p, l, s)
    join = max(1, LANES // r)

    def first(x_ref, a_ref, i, j):
        """x_i times the rank columns of output blocks j, j + 1, ... that fill whole lanes: (tokens, join r)."""
        x_i = x_ref[:, pl.ds(pl.multiple_of(i * width, LANES), width)]
        at = pl.ds(pl.multiple_of(j * r, join * r), join * r)
        weight = a_ref[i, at, :] if transposed else a_ref[i, :, at]
        return _dot(x_i, weight, transposed).astype(x.dtype)

    def kernel(x_ref, a_ref, b_ref, y_ref, z_ref):
        def blocks(jj, _):
            def gather(ii, _):
                parts = [first(x_ref, a_ref, ii * join + q, jj * join) for q in range(join)]
                at = pl.ds(pl.multiple_of(ii * join * r, join * r), join * r)
                for q in range(join):
                    pieces = [part[:, q * r : (q + 1) * r] for part in parts]
                    z_ref[q, :, at] = pieces[0] if join == 1 else jnp.concatenate(pieces, axis=1)
                return 0

            lax.fori_loop(0, ins // join, gather, 0)
            for q in range(join):
                j = jj * join + q

                def columns(c, _, q=q, j=j):
                    at = pl.ds(pl.multiple_of(c * chunk, LANES), chunk)
                    weight = b_ref[j, at, :] if transposed else b_ref[j, :, at]
                    y = _dot(z_ref[q], weight, transposed)
                    y_ref[:, pl.ds(pl.multiple_of(j * out_width + c * chunk, LANES), chunk)] = y.astype(y_ref.dtype)
                    return 0

                lax.fori_loop(0, out_width // chunk, columns, 0)
            return 0

        lax.fori_loop(0, group // join, blocks, 0)

    chunk = CHUNK if out_width % CHUNK == 0 else LANES
    if transposed:
        weights = left, right
        specs = [
            pl.BlockSpec((l, group * r, s), lambda j, i: (0, j, 0)),
            pl.BlockSpec((group, p, lr), lambda j, i: (j, 0, 0)),
        ]
    else:
        weights = right, left
        specs = [
            pl.BlockSpec((k, p, group * r), lambda j, i: (0, 0, j)),
            pl.BlockSpec((group, kr, s), lambda j, i: (j, 0, 0)),
        ]
    size = x.dtype.itemsize
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, outs * out_width), x.dtype),
        grid=(outs // group, pl.cdiv(m, bm)),
        in_specs=[pl.BlockSpec((bm, ins * width), lambda j, i: (i, 0)), *specs],
        out_specs=pl.BlockSpec((bm, group * out_width), lambda j, i: (i, j)),
        scratch_shapes=[pltpu.VMEM((join, bm, ins * r), x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tiles.vmem),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * (right.size + left.size),
            bytes_accessed=(x.size * (outs // group) + m * outs * out_width + right.size + left.size) * size,
            transcendentals=0,
        ),
        name="monarch_backward_x" if transposed else "monarch_forward",
        interpret=interpret,
    )(x, *weights)


def backward_weights(
    x: jax.Array, dy: jax.Array, right: jax.Array, left: jax.Array, tiles: Tiles, interpret: object = False
) -> tuple[jax.Array, jax.Array]:
    """x (M, k p), dy (M, l s) -> gradients of right (k, p, l r) and left (l, k r, s) in f32; M is whole token tiles.

    Per output block j: Z again from x, dZ = dy_j left_j^T, then left_j += Z^T dy_j and right[:, j] += x^T dZ; both stay
    in VMEM while tokens pass.
    """
    (k, p, lr), (l, kr, s) = right.shape, left.shape
    r, m, bm, group = lr // l, x.shape[0], tiles.tokens, tiles.blocks
    join = max(1, LANES // r)

    def kernel(x_ref, dy_ref, right_ref, left_ref, dright_ref, dleft_ref, z_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            dright_ref[...] = jnp.zeros_like(dright_ref)
            dleft_ref[...] = jnp.zeros_like(dleft_ref)

        def blocks(jj, _):
            lanes = pl.ds(pl.multiple_of(jj * join * r, join * r), join * r)

            def gather(ii, _):
                at = pl.ds(pl.multiple_of(ii * join * r, join * r), join * r)
                x_of = lambda q: x_ref[:, pl.ds(pl.multiple_of((ii * join + q) * p, LANES), p)]
                parts = [_dot(x_of(q), right_ref[ii * join + q, :, lanes], False) for q in range(join)]
                for q in range(join):
                    pieces = [part[:, q * r : (q + 1) * r].astype(x.dtype) for part in parts]
                    z_ref[q, :, at] = pieces[0] if join == 1 else jnp.concatenate(pieces, axis=1)
                return 0

            lax.fori_loop(0, k // join, gather, 0)
            for q in range(join):
                j = jj * join + q
                dy_j = dy_ref[:, pl.ds(pl.multiple_of(j * s, LANES), s)]
                dleft_ref[j] += _dot_tokens(z_ref[q], dy_j)
                z_ref[q] = _dot(dy_j, left_ref[j], True).astype(x.dtype)

            def scatter(ii, _):
                at = pl.ds(pl.multiple_of(ii * join * r, join * r), join * r)
                held = [z_ref[q, :, at] for q in range(join)]
                for q in range(join):
                    i = ii * join + q
                    pieces = [h[:, q * r : (q + 1) * r] for h in held]
                    dz = pieces[0] if join == 1 else jnp.concatenate(pieces, axis=1)
                    x_i = x_ref[:, pl.ds(pl.multiple_of(i * p, LANES), p)]
                    dright_ref[i, :, lanes] += _dot_tokens(x_i, dz)
                return 0

            lax.fori_loop(0, k // join, scatter, 0)
            return 0

        lax.fori_loop(0, group // join, blocks, 0)

    size, groups = x.dtype.itemsize, l // group
    right_spec = pl.BlockSpec((k, p, group * r), lambda j, i: (0, 0, j))
    left_spec = pl.BlockSpec((group, kr, s), lambda j, i: (j, 0, 0))
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(right.shape, jnp.float32),
            jax.ShapeDtypeStruct(left.shape, jnp.float32),
        ),
        grid=(groups, m // bm),
        in_specs=[
            pl.BlockSpec((bm, k * p), lambda j, i: (i, 0)),
            pl.BlockSpec((bm, group * s), lambda j, i: (i, j)),
            right_spec,
            left_spec,
        ],
        out_specs=(right_spec, left_spec),
        scratch_shapes=[pltpu.VMEM((join, bm, kr), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * (2 * right.size + 2 * left.size),
            bytes_accessed=(x.size * groups + dy.size) * size + (right.size + left.size) * (size + 4),
            transcendentals=0,
        ),
        name="monarch_backward_weights",
        interpret=interpret,
    )(x, dy, right, left)


def _dot(a: jax.Array, b: jax.Array, transposed: bool) -> jax.Array:
    """a @ b, or a @ b^T, in f32."""
    return lax.dot_general(a, b, (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32)


def _dot_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T @ b over tokens, in f32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
