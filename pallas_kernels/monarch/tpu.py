"""The two-stage product of a block-low-rank matrix on TPU, with nothing between the stages leaving VMEM.

W (k p, l s) is right (k, p, l r) and left (l, k r, s): y_j = sum_i (x_i right_i[:, j]) left_j[i]. Output block j reads the
columns j of every right block and left block j alone, so blocks of columns are independent. The first stage is one GEMM
per input block; its rank groups are stored in VMEM by output block, as Z_j (tokens, k r), which makes the second stage one
GEMM per output block. Groups of 128 lanes and more land there by plain stores, narrower ones are joined in whole lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.monarch.configs import Tiles
from pallas_kernels.tiling import LANES

CHUNK = 256
"""Columns of one GEMM, whose sums then stay in registers."""


def forward(
    x: jax.Array,
    right: jax.Array,
    left: jax.Array,
    tiles: Tiles,
    interpret: object = False,
    transposed: bool = False,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """x (M, k p), right (k, p, l r), left (l, k r, s) -> y (M, l s), and Z (M, l k r) if `keep`.

    Sums are in f32, Z in the dtype of x. `transposed`: dy (M, l s) -> dy W^T (M, k p) by the same two stages in the
    opposite order, the operands as they are.

    Grid (cores, groups of output blocks, token tiles): the weights of a group are brought block by block while the first
    token tile is worked on, and stay while the others pass.
    """
    (k, p, lr), (l, _, s) = right.shape, left.shape
    r, m, bm, group, cores = lr // l, x.shape[0], tiles.tokens, tiles.blocks, tiles.cores
    ins, width, outs, out_width = (l, s, k, p) if transposed else (k, p, l, s)
    join = max(1, LANES // r)
    deep, wide = _chunk(group * r, join * r), _chunk(out_width, LANES)
    weights = (left, right) if transposed else (right, left)
    steps = pl.cdiv(m, bm) // cores

    def kernel(x_ref, a_hbm, b_hbm, y_ref, *refs):
        z_ref, a_ref, b_ref, arrived = refs if keep else (refs[2], refs[0], refs[1], refs[3])
        at_group = pl.program_id(1)

        def bring_first(i: jax.Array | int) -> Any:
            ranks = pl.ds(at_group * group * r, group * r)
            source = a_hbm.at[i] if group == outs else a_hbm.at[i, ranks, :] if transposed else a_hbm.at[i, :, ranks]
            return pltpu.make_async_copy(source, a_ref.at[i], arrived.at[i])

        def bring_second(j: jax.Array | int) -> Any:
            return pltpu.make_async_copy(b_hbm.at[at_group * group + j], b_ref.at[j], arrived.at[ins + j])

        def first(ii: jax.Array | int, wait: bool) -> None:
            if wait:
                for q in range(join):
                    bring_first(ii * join + q).wait()
            for at in range(0, group * r, deep):
                cut = lambda i, at=at: a_ref[i, at : at + deep, :] if transposed else a_ref[i, :, at : at + deep]
                panels = [
                    _dot(x_ref[:, _lanes(ii * join + q, width)], cut(ii * join + q), transposed).astype(x.dtype)
                    for q in range(join)
                ]
                for j, part in enumerate(_regroup(panels, deep // r, r)):
                    z_ref[:, _lanes(ii, join * r, (at // r + j) * ins * r)] = part

        def second(j: jax.Array | int, wait: bool) -> None:
            if wait:
                bring_second(j).wait()
            for at in range(0, out_width, wide):
                weight = b_ref[j, at : at + wide, :] if transposed else b_ref[j, :, at : at + wide]
                y = _dot(z_ref[:, _lanes(j, ins * r)], weight, transposed)
                y_ref[:, pl.ds(pl.multiple_of(j * out_width + at, LANES), wide)] = y.astype(y_ref.dtype)

        @pl.when(pl.program_id(2) == 0)
        def _():
            _loop(ins, ins, lambda i: bring_first(i).start())
            _loop(group, group, lambda j: bring_second(j).start())
            _loop(ins // join, 1, lambda i: first(i, True))
            _loop(group, 1, lambda j: second(j, True))

        @pl.when(pl.program_id(2) > 0)
        def _():
            _loop(ins // join, tiles.first // join, lambda i: first(i, False))
            _loop(group, tiles.second, lambda j: second(j, False))

    held = (
        [(ins, group * r, width), (group, *right.shape[1:])]
        if transposed
        else [(ins, width, group * r), (group, *left.shape[1:])]
    )
    size = x.dtype.itemsize
    z_block = (bm, group * ins * r)
    found = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((m, outs * out_width), x.dtype),
            *([jax.ShapeDtypeStruct((m, outs * ins * r), x.dtype)] if keep else []),
        ],
        grid=(cores, outs // group, steps),
        in_specs=[
            pl.BlockSpec((bm, ins * width), lambda c, j, i: (c * steps + i, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            pl.BlockSpec((bm, group * out_width), lambda c, j, i: (c * steps + i, j)),
            *([pl.BlockSpec(z_block, lambda c, j, i: (c * steps + i, j))] if keep else []),
        ],
        scratch_shapes=[
            *(pltpu.VMEM(shape, x.dtype) for shape in held),
            *([] if keep else [pltpu.VMEM(z_block, x.dtype)]),
            pltpu.SemaphoreType.DMA((ins + group,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * (right.size + left.size),
            bytes_accessed=(x.size * (outs // group) + m * outs * out_width + cores * (right.size + left.size)) * size,
            transcendentals=0,
        ),
        name="monarch_backward_x" if transposed else "monarch_forward",
        interpret=interpret,
    )(x, *weights)
    return found[0], found[1] if keep else None


def backward(
    x: jax.Array,
    dy: jax.Array,
    right: jax.Array,
    left: jax.Array,
    tiles: Tiles,
    with_x: bool,
    interpret: object = False,
    z: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """x (M, k p), dy (M, l s) -> gradients of x (if `with_x`, which needs all blocks at once), right (k, p, l r), left.

    M is whole token tiles for every core. Z (M, l k r) as given or again from x, then per output block left_j += Z_j^T dy_j and dZ_j = dy_j
    left_j^T in its place, then per input block, with its groups of dZ, right_i += x_i^T dZ and dx_i = dZ right_i^T. The
    sums stay in VMEM in f32 while tokens pass, and leave in the dtype of x over the weights, which are done with; those of
    several cores leave in f32, to be added up.
    """
    (k, p, lr), (l, kr, s) = right.shape, left.shape
    r, m, bm, group, cores = lr // l, x.shape[0], tiles.tokens, tiles.blocks, tiles.cores
    join = max(1, LANES // r)
    deep = _chunk(group * r, join * r)
    steps = m // bm // cores
    out_dtype = x.dtype if cores == 1 else jnp.dtype(jnp.float32)

    def kernel(x_ref, dy_ref, *refs):
        held_ref, refs = (None, refs) if z is None else (refs[0], refs[1:])
        right_hbm, left_hbm, *refs = refs
        dx_ref, refs = (refs[0], refs[1:]) if with_x else (None, refs)
        dright_hbm, dleft_hbm, right_ref, left_ref, right_sum, left_sum, z_ref, arrived = refs
        core, at_group, step = (pl.program_id(a) for a in range(3))
        ranks = pl.ds(at_group * group * r, group * r)
        part = lambda ref, *at: ref.at[at] if group == l else ref.at[(*at, slice(None), ranks)]
        bring_right = lambda i: pltpu.make_async_copy(part(right_hbm, i), right_ref.at[i], arrived.at[i])
        block = lambda j: at_group * group + j
        bring_left = lambda j: pltpu.make_async_copy(left_hbm.at[block(j)], left_ref.at[j], arrived.at[k + j])

        def first(ii: jax.Array | int, wait: bool) -> None:
            if wait:
                for q in range(join):
                    bring_right(ii * join + q).wait()
            for at in range(0, group * r if held_ref is None else 0, deep):
                panels = [
                    _dot(x_ref[:, _lanes(ii * join + q, p)], right_ref[ii * join + q, :, at : at + deep]).astype(
                        x.dtype
                    )
                    for q in range(join)
                ]
                for j, piece in enumerate(_regroup(panels, deep // r, r)):
                    z_ref[:, _lanes(ii, join * r, (at // r + j) * kr)] = piece

        def second(j: jax.Array | int, wait: bool) -> None:
            if wait:
                bring_left(j).wait()
            dy_j = dy_ref[:, _lanes(j, s)]
            z_j = (z_ref if held_ref is None else held_ref)[:, _lanes(j, kr)]
            left_sum[j] += _dot_tokens(z_j, dy_j)
            z_ref[:, _lanes(j, kr)] = _dot(dy_j, left_ref[j], True).astype(x.dtype)

        def third(ii: jax.Array | int) -> None:
            pieces = [z_ref[:, _lanes(ii, join * r, j * kr)] for j in range(group)]
            for q, dz in enumerate(_regroup(pieces, join, r)):
                i = ii * join + q
                right_sum[i] += _dot_tokens(x_ref[:, _lanes(i, p)], dz)
                if with_x:
                    dx_ref[:, _lanes(i, p)] = _dot(dz, right_ref[i], True).astype(x.dtype)

        @pl.when(step == 0)
        def _():
            _loop(k, k, lambda i: bring_right(i).start())
            _loop(group, group, lambda j: bring_left(j).start())
            right_sum[...] = jnp.zeros_like(right_sum)
            left_sum[...] = jnp.zeros_like(left_sum)
            _loop(k // join, 1, lambda i: first(i, True))
            _loop(group, 1, lambda j: second(j, True))

        @pl.when(step > 0)
        def _():
            _loop(k // join, tiles.first // join, lambda i: first(i, False))
            _loop(group, tiles.second, lambda j: second(j, False))

        _loop(k // join, tiles.first // join, third)

        @pl.when(step == steps - 1)
        def _():
            done_right, done_left = right_sum, left_sum
            if cores == 1:
                done_right, done_left = right_ref, left_ref
                right_ref[...] = right_sum[...].astype(right_ref.dtype)
                left_ref[...] = left_sum[...].astype(left_ref.dtype)
            send = [
                pltpu.make_async_copy(done_right.at[i], part(dright_hbm, core, i), arrived.at[i]) for i in range(k)
            ] + [
                pltpu.make_async_copy(done_left.at[j], dleft_hbm.at[core, block(j)], arrived.at[k + j])
                for j in range(group)
            ]
            for copy in send:
                copy.start()
            for copy in send:
                copy.wait()

    anywhere, size = pl.BlockSpec(memory_space=pl.ANY), x.dtype.itemsize
    panel = pl.BlockSpec((bm, k * p), lambda c, j, i: (c * steps + i, 0))
    out_shapes = [jax.ShapeDtypeStruct((cores, *w.shape), out_dtype) for w in (right, left)]
    found = pl.pallas_call(
        kernel,
        out_shape=[*([jax.ShapeDtypeStruct(x.shape, x.dtype)] if with_x else []), *out_shapes],
        grid=(cores, l // group, steps),
        in_specs=[
            panel,
            pl.BlockSpec((bm, group * s), lambda c, j, i: (c * steps + i, j)),
            *([] if z is None else [pl.BlockSpec((bm, group * kr), lambda c, j, i: (c * steps + i, j))]),
            anywhere,
            anywhere,
        ],
        out_specs=[*([panel] if with_x else []), anywhere, anywhere],
        scratch_shapes=[
            pltpu.VMEM((k, p, group * r), x.dtype),
            pltpu.VMEM((group, kr, s), x.dtype),
            pltpu.VMEM((k, p, group * r), jnp.float32),
            pltpu.VMEM((group, kr, s), jnp.float32),
            pltpu.VMEM((bm, group * kr), x.dtype),
            pltpu.SemaphoreType.DMA((k + group,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * ((2 if with_x else 1) * right.size + 2 * left.size + (right.size if z is None else 0)),
            bytes_accessed=size
            * (
                x.size * (l // group + with_x)
                + dy.size
                + (0 if z is None else z.size)
                + 2 * cores * (right.size + left.size)
            ),
            transcendentals=0,
        ),
        name="monarch_backward" if with_x else "monarch_backward_weights",
        interpret=interpret,
    )(x, dy, *([] if z is None else [z]), right, left)
    *dx, dright, dleft = found
    total = lambda sums: (sums[0] if cores == 1 else jnp.sum(sums, axis=0)).astype(x.dtype)
    return (dx[0] if with_x else None), total(dright), total(dleft)


def _regroup(panels: list[jax.Array], groups: int, r: int) -> list[jax.Array]:
    """Panels (tokens, groups r) -> for each group the lanes r of every panel, side by side: (tokens, panels r)."""
    cut = lambda j: [panel[:, j * r : (j + 1) * r] for panel in panels]
    return [cut(j)[0] if len(panels) == 1 else jnp.concatenate(cut(j), axis=1) for j in range(groups)]


def _chunk(total: int, unit: int) -> int:
    """The largest divisor of `total` in multiples of `unit` up to CHUNK, or `unit`."""
    return max([d for d in range(unit, CHUNK + 1, unit) if total % d == 0] or [unit])


def _lanes(i: jax.Array | int, width: int, start: int = 0) -> pl.Slice:
    return pl.ds(pl.multiple_of(start + i * width, LANES), width)


def _loop(count: int, stretch: int, step: Callable[[jax.Array | int], Any]) -> None:
    """`step(i)` for every i, the largest divisor of `count` up to `stretch` of them in one basic block."""
    most = max(d for d in range(1, min(count, max(1, stretch)) + 1) if count % d == 0)

    def body(i: jax.Array | int, _: int) -> int:
        for q in range(most):
            step(i * most + q)
        return 0

    body(0, 0) if most == count else lax.fori_loop(0, count // most, body, 0)


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b^T, in f32."""
    return lax.dot_general(a, b, (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32)


def _dot_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T @ b over the tokens, in f32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
