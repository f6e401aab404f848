"""The product with a sum of Kronecker products on TPU, in one pass over x.

x (M, n1 n2) is a matrix (n1, n2) per row, and y per row the sum over terms of A_t^T x B_t. B is applied to the n1 lane
groups of x; strided stores then lay the results out with (row, i) on sublanes, where A is one GEMM by the block-diagonal
matrix of g copies of A^T, g rows of x at a time; strided loads bring (row, p) back to the lane groups of y. Strides are
those of 32-bit words: two groups of bf16 share a word, which is how two neighbouring sublanes of bf16 are held anyway.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kronecker.configs import BACKWARD_GROUPS, FORWARD_GROUPS, Tiles
from pallas_kernels.tiling import LANES


def copies(a: jax.Array, group: int) -> jax.Array:
    """a (terms, n1, m1) -> (terms, group n1, group m1): A_t `group` times on the diagonal.

    By products with tiled identities, because reshapes of narrow arrays cost copies; nothing is rounded.
    """
    down, across = (_tiled(size, group).astype(a.dtype) for size in a.shape[1:])
    filled = jnp.einsum("rn,tnm,cm->trc", down, a, across, precision="highest")
    return jnp.where(_diagonal(a.shape, group), filled, 0)


def _tiled(size: int, group: int) -> jax.Array:
    """`group` identities below one another: f32 (group size, size)."""
    return jnp.tile(jnp.eye(size, dtype=jnp.float32), (group, 1))


def _diagonal(shape: tuple[int, ...], group: int) -> jax.Array:
    """Which entries (group n1, group m1) lie in a block on the diagonal."""
    rows, columns = (jnp.arange(group * size) // size for size in shape[1:])
    return rows[:, None] == columns


def forward(x: jax.Array, a: jax.Array, b: jax.Array, tiles: Tiles, interpret: Any = False) -> jax.Array:
    """x (M, n1 n2), a (terms, n1, m1), b (terms, n2, m2) -> (M, m1 m2), sums in f32; M is whole token tiles."""
    (terms, n1, m1), (_, n2, m2) = a.shape, b.shape
    bm, group, m = tiles.tokens, tiles.group, x.shape[0]
    columns = m2 // LANES

    def kernel(x_ref, a_ref, b_ref, y_ref, z_ref, u_ref):
        for t in range(terms):
            minor = lambda i, t=t: _dot(x_ref[:, i * n2 : (i + 1) * n2], b_ref[t]).astype(x.dtype)
            _to_rows(minor, z_ref, n1, bm, t * columns * bm * n1)

        def major(step, _):
            work = [(step * FORWARD_GROUPS + q, c) for q in range(FORWARD_GROUPS) for c in range(columns)]
            for both in (work[at : at + 2] for at in range(0, len(work), 2)):  # fills matrix units of 256 lanes
                places = lambda t, both=both: [(k, (t * columns + c) * bm * n1) for k, c in both]
                u = sum(_dot(a_ref[t], _load(z_ref, group * n1, places(t))) for t in range(terms))
                for q, (k, c) in enumerate(both):
                    u_ref[_at(k, group * m1, c * bm * m1), :] = u[:, q * LANES : (q + 1) * LANES].astype(x.dtype)
            return 0

        lax.fori_loop(0, bm // group // FORWARD_GROUPS, major, 0, unroll=2)
        _from_rows(u_ref, y_ref, m1)

    spread = copies(a, group).mT
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, m1 * m2), x.dtype),
        grid=(m // bm,),
        in_specs=[_rows(bm, n1 * n2), _whole(spread.shape), _whole(b.shape)],
        out_specs=_rows(bm, m1 * m2),
        scratch_shapes=[
            _words(terms * columns * bm * n1, x.dtype),
            pltpu.VMEM((columns * bm * m1, LANES), x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tiles.vmem),
        cost_estimate=_cost(1, x, m1 * m2, a, b),
        name="kronecker_forward",
        interpret=interpret,
    )(x, spread, b)


def backward(
    x: jax.Array, dy: jax.Array, a: jax.Array, b: jax.Array, tiles: Tiles, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (M, n1 n2), dy (M, m1 m2) -> gradients of x, of a and of b, the last two in f32; M is whole token tiles, as many
    for every core.

    One pass over x and dy. Per row of x, as matrices: V = dy B^T, then dx = A V, dA = x V^T and dB = (A^T x)^T dy. The
    blocks of A's gradient are the diagonal ones of a product over g rows at once; the others are thrown away.
    """
    (terms, n1, m1), (_, n2, m2) = a.shape, b.shape
    bm, group, m, cores = tiles.tokens, tiles.group, x.shape[0], tiles.cores
    steps = m // bm // cores
    rows_x, rows_y = group * n1, group * m1

    def kernel(x_ref, dy_ref, a_ref, at_ref, b_ref, dx_ref, da_ref, db_ref, x_rows, dy_rows, dx_rows):
        @pl.when(pl.program_id(1) == 0)
        def _():
            da_ref[...] = jnp.zeros_like(da_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        _to_rows(lambda i: x_ref[:, i * n2 : (i + 1) * n2], x_rows, n1, bm)
        _to_rows(lambda p: dy_ref[:, p * m2 : (p + 1) * m2], dy_rows, m1, bm)

        def groups(step, _):
            which = [step * BACKWARD_GROUPS + q for q in range(BACKWARD_GROUPS)]
            xs = [_load(x_rows, rows_x, [(k, c * bm * n1) for c in range(n2 // LANES)]) for k in which]
            dys = jnp.concatenate(
                [_load(dy_rows, rows_y, [(k, c * bm * m1) for c in range(m2 // LANES)]) for k in which], axis=0
            )
            dx = [0.0] * BACKWARD_GROUPS
            for t in range(terms):
                # Slices and transposes are taken of f32: of narrower values not every chip's compiler can.
                wide = _dot(dys, b_ref[t], (1, 1))
                v = [wide[q * rows_y : (q + 1) * rows_y].astype(x.dtype) for q in range(BACKWARD_GROUPS)]
                dx = [total + _dot(a_ref[t], part) for total, part in zip(dx, v)]
                da_ref[0, t] += sum(_dot(part, x_k, (1, 1)) for part, x_k in zip(v, xs))
                u = jnp.concatenate([_dot(at_ref[t], x_k) for x_k in xs], axis=0)
                db_ref[0, t] += _dot(u.T.astype(x.dtype), dys)
            for k, part in zip(which, dx):
                for c in range(n2 // LANES):
                    dx_rows[_at(k, rows_x, c * bm * n1), :] = part[:, c * LANES : (c + 1) * LANES].astype(x.dtype)
            return 0

        lax.fori_loop(0, bm // group // BACKWARD_GROUPS, groups, 0, unroll=2)
        _from_rows(dx_rows, dx_ref, n1)

    spread = copies(a, group)
    dx, da, db = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((cores, terms, rows_y, rows_x), jnp.float32),
            jax.ShapeDtypeStruct((cores, *b.shape), jnp.float32),
        ),
        grid=(cores, steps),
        in_specs=[
            _panel(bm, n1 * n2, steps),
            _panel(bm, m1 * m2, steps),
            _whole(spread.shape),
            _whole(spread.mT.shape),
            _whole(b.shape),
        ],
        out_specs=(_panel(bm, n1 * n2, steps), _per_core((terms, rows_y, rows_x)), _per_core(b.shape)),
        scratch_shapes=[
            _words(n2 // LANES * bm * n1, x.dtype),
            _words(m2 // LANES * bm * m1, x.dtype),
            pltpu.VMEM((n2 // LANES * bm * n1, LANES), x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=_cost(3, x, m1 * m2 + n1 * n2, a, b),
        name="kronecker_backward",
        interpret=interpret,
    )(x, dy, spread, spread.mT, b)
    # The same tiled identities as in `copies` add up the blocks.
    kept = jnp.where(_diagonal(a.shape, group).T, da.sum(0), 0)
    return dx, jnp.einsum("rn,tcr,cm->tnm", _tiled(n1, group), kept, _tiled(m1, group), precision="highest"), db.sum(0)


def _to_rows(lanes_of: Any, rows: Any, groups: int, tokens: int, first: int = 0) -> None:
    """lanes_of(i) (tokens, width) of every group i -> row `first` + (column tokens + token) groups + i of rows.

    rows hold 32-bit words: f32, or two groups of bf16 in uint32.
    """
    pack = 1 if rows.dtype == jnp.float32 else 2
    for i in range(0, groups, pack):
        parts = [lanes_of(i + q).astype(jnp.float32) for q in range(pack)]
        for c in range(parts[0].shape[1] // LANES):
            lanes = [part[:, c * LANES : (c + 1) * LANES] for part in parts]
            word = lanes[0]
            if pack == 2:  # bf16 is the upper half of f32
                low, high = (lax.bitcast_convert_type(v, jnp.uint32) for v in lanes)
                word = (low >> 16) | high
            rows[pl.ds((first + c * tokens * groups + i) // pack, tokens, stride=groups // pack), :] = word


def _from_rows(rows: Any, panel: Any, groups: int) -> None:
    """The reverse: rows (columns tokens groups, 128) of the panel's dtype -> panel (tokens, groups width)."""
    tokens, columns = panel.shape[0], panel.shape[1] // groups // LANES
    pack = 4 // rows.dtype.itemsize
    words = rows if pack == 1 else rows.bitcast(jnp.uint32)
    for i in range(0, groups, pack):
        for c in range(columns):
            word = words[pl.ds((c * tokens * groups + i) // pack, tokens, stride=groups // pack), :]
            halves = [word] if pack == 1 else [word << 16, word & jnp.uint32(0xFFFF0000)]
            for q, half in enumerate(halves):
                at = ((i + q) * columns + c) * LANES
                panel[:, at : at + LANES] = lax.bitcast_convert_type(half, jnp.float32).astype(panel.dtype)


def _load(rows: Any, size: int, places: list[tuple[jax.Array, int]]) -> jax.Array:
    """Of every (k, first) rows first + k size ... first + (k + 1) size, side by side: (size, 128 of each)."""
    if rows.dtype == jnp.float32:
        parts = [rows[_at(k, size, first), :] for k, first in places]
    else:
        parts = [pltpu.bitcast(rows[_at(k, size // 2, first // 2), :], jnp.bfloat16) for k, first in places]
    return jnp.concatenate(parts, axis=1)


def _at(k: jax.Array, size: int, first: int = 0) -> Any:
    return pl.ds(pl.multiple_of(first + k * size, size), size)


def _words(rows: int, dtype: Any) -> Any:
    """Scratch of `rows` rows of 128 entries of `dtype` in 32-bit words."""
    return (
        pltpu.VMEM((rows, LANES), jnp.float32) if dtype == jnp.float32 else pltpu.VMEM((rows // 2, LANES), jnp.uint32)
    )


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    """a and b contracted over one axis of each, in f32."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _rows(tokens: int, width: int) -> pl.BlockSpec:
    """The tile of step i."""
    return pl.BlockSpec((tokens, width), lambda i: (i, 0))


def _panel(tokens: int, width: int, steps: int) -> pl.BlockSpec:
    """The tile of step i of core c."""
    return pl.BlockSpec((tokens, width), lambda c, i: (c * steps + i, 0))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _per_core(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda c, i: (c, *[0] * len(shape)))


def _cost(products: int, x: jax.Array, others: int, a: jax.Array, b: jax.Array) -> pl.CostEstimate:
    """Of `products` products; `others`: entries per row moved beside x."""
    (terms, n1, m1), (_, n2, m2), m = a.shape, b.shape, x.shape[0]
    return pl.CostEstimate(
        flops=2 * products * m * terms * n1 * m2 * (n2 + m1),
        bytes_accessed=(x.size + m * others + a.size + b.size) * x.dtype.itemsize,
        transcendentals=0,
    )
