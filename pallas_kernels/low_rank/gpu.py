"""x A B of low rank on Hopper in one kernel: h = x A stays in shared memory, where XLA would write and read it.

A CTA takes 64 rows of x per multiplying warpgroup. It sums h (rows, r) over the depth of x in registers, rounds it into
shared memory, and multiplies it with strips of B; with few rows, several CTAs take the same ones and compute h again, each
for its own columns of y. Lowered and run in interpret mode only: no time or number of it was taken on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.hopper import claim, drain, launch, part, registers, release, smem, store
from pallas_kernels.hopper_tiles import BARRIERS, DEPTH, PIECE
from pallas_kernels.tiling import whole_tiles


@dataclasses.dataclass(frozen=True)
class Tile:
    """Attributes:
    groups: multiplying warpgroups, 64 rows each. columns: of y summed at once. splits: CTAs that share their rows.
    slots: steps in flight of the first product, and of the second.
    """

    groups: int
    columns: int
    splits: int
    slots: tuple[int, int]


def tile_of(chip: Chip, m: int, k: int, r: int, out: int) -> Tile:
    """The tile whose CTAs, all of them at once on the chip or in turns, load least (an estimate: 32 bytes a cycle)."""
    columns = 128 if out % 128 == 0 else 64

    def cost(groups: int, splits: int) -> tuple[float, int]:
        turns = math.ceil(math.ceil(m / (PIECE * groups)) * splits / chip.sms)
        return turns * (k * (PIECE * groups + r) + out // splits * (PIECE * groups + r)), splits

    shares = [s for s in range(1, min(16, out // columns) + 1) if out // columns % s == 0]
    groups, splits = min(((g, s) for g in (2, 1) for s in shares), key=lambda pair: cost(*pair))
    held = 2 * PIECE * groups * (r + 2 * DEPTH) + BARRIERS
    first = lambda second: (chip.vmem - held - second * 2 * DEPTH * columns) // (2 * DEPTH * (PIECE * groups + r))
    second = next(s for s in (4, 3, 2) if first(s) >= s)
    return Tile(groups, columns, splits, (min(first(second), 6), second))


def fused(x: jax.Array, a: jax.Array, b: jax.Array, chip: Chip, interpret: Any = None) -> jax.Array:
    """x (M, k), a (r, k), b (r, n), all bfloat16 -> x a^T b (M, n); sums in f32, h rounded to bfloat16."""
    (m, k), (r, out) = x.shape, b.shape
    tile = tile_of(chip, m, k, r, out)
    x = whole_tiles(x, PIECE * tile.groups)
    tiles = x.shape[0] // (PIECE * tile.groups) * tile.splits
    programs = min(chip.sms, tiles)

    def entry(x_gmem, a_gmem, b_gmem, y_gmem):
        many = lambda slots: dict(num_barriers=slots)
        pl.run_scoped(
            functools.partial(_program, tile, tiles, programs, (x_gmem, a_gmem, b_gmem, y_gmem)),
            x_smem=smem((tile.slots[0], tile.groups, PIECE, DEPTH), x.dtype),
            a_smem=smem((tile.slots[0], r, DEPTH), x.dtype),
            b_smem=smem((tile.slots[1], DEPTH, tile.columns), x.dtype),
            h_smem=smem((tile.groups, PIECE, r), x.dtype),
            out_smem=smem((tile.groups, 2, PIECE, DEPTH), x.dtype),
            full=[plgpu.Barrier(num_arrivals=n, **many(s)) for n, s in zip((tile.groups + 1, 1), tile.slots)],
            free=[plgpu.Barrier(num_arrivals=tile.groups, **many(s)) for s in tile.slots],
            collective_axes="warpgroup",
        )

    y = jax.ShapeDtypeStruct((x.shape[0], out), x.dtype)
    return launch("low_rank", entry, y, programs, tile.groups, interpret)(x, a, b)[:m]


def _program(
    tile: Tile, tiles: int, programs: int, gmem: Any, *, x_smem, a_smem, b_smem, h_smem, out_smem, full, free
) -> None:
    x_gmem, a_gmem, b_gmem, y_gmem = gmem
    (r, k), share = a_gmem.shape, b_gmem.shape[1] // tile.splits
    deep, flat, strips = k // DEPTH, r // DEPTH, share // tile.columns
    me, group = lax.axis_index("sm"), lax.axis_index("warpgroup")
    mine = lax.div(jnp.int32(tiles - 1) - me, jnp.int32(programs)) + 1

    def place(n: Any) -> tuple[Any, Any]:
        """First row and first column of y of this program's tile n."""
        at = me + n * programs
        return lax.div(at, jnp.int32(tile.splits)) * (PIECE * tile.groups), lax.rem(at, jnp.int32(tile.splits)) * share

    @pl.when(group == tile.groups)
    def _():
        registers(tile.groups, False)

        @pl.loop(jnp.int32(0), mine)
        def _(n):
            row, column = place(n)

            @pl.loop(jnp.int32(0), jnp.int32(deep))
            def _(at):
                slot = claim(free[0], n * deep + at, tile.slots[0])
                for g in range(tile.groups):
                    source = part(x_gmem, (row + g * PIECE, at * DEPTH), (PIECE, DEPTH))
                    plgpu.copy_gmem_to_smem(source, x_smem.at[slot, g], full[0].at[slot])
                source = part(a_gmem, (at * 0, at * DEPTH), (r, DEPTH))
                plgpu.copy_gmem_to_smem(source, a_smem.at[slot], full[0].at[slot])

            @pl.loop(jnp.int32(0), jnp.int32(strips * flat))
            def _(at):
                slot = claim(free[1], n * (strips * flat) + at, tile.slots[1])
                corner = lax.rem(at, flat) * DEPTH, column + lax.div(at, flat) * tile.columns
                source = part(b_gmem, corner, (DEPTH, tile.columns))
                plgpu.copy_gmem_to_smem(source, b_smem.at[slot], full[1].at[slot])

        for at, steps in enumerate((deep, strips * flat)):
            drain(free[at], mine * steps, tile.slots[at])

    @pl.when(group < tile.groups)
    def _():
        registers(tile.groups, True)
        h = h_smem.at[group]

        @pl.loop(jnp.int32(0), mine)
        def _(n):
            row, column = place(n)

            def operands(at: Any) -> Any:
                slot = lax.rem(at, jnp.int32(tile.slots[0]))
                return x_smem.at[slot, group], a_smem.at[slot].transpose((1, 0))

            h[...] = _sum((PIECE, r), n * deep, deep, operands, full[0], free[0], tile.slots[0]).astype(x_smem.dtype)
            plgpu.commit_smem()

            @pl.loop(jnp.int32(0), jnp.int32(strips))
            def _(strip):
                first = (n * strips + strip) * flat

                def operands(at: Any) -> Any:
                    deep_at = (at - first) * DEPTH
                    return h.at[:, pl.ds(deep_at, DEPTH)], b_smem.at[lax.rem(at, jnp.int32(tile.slots[1]))]

                y = _sum((PIECE, tile.columns), first, flat, operands, full[1], free[1], tile.slots[1])
                at = row + group * PIECE, column + strip * tile.columns
                store(y.astype(y_gmem.dtype), out_smem.at[group], y_gmem, lambda i, j: (at[0] + i, at[1] + j))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum(shape: tuple[int, int], first: Any, steps: int, operands: Any, full: Any, free: Any, slots: int) -> jax.Array:
    """The sum in f32 of the products of `operands(step)` over `steps` of the ring from `first` on."""

    def scope(acc: Any) -> jax.Array:
        @pl.loop(jnp.int32(0), jnp.int32(steps))
        def _(n):
            at = first + n
            plgpu.barrier_wait(full.at[lax.rem(at, jnp.int32(slots))])
            plgpu.wgmma(acc, *operands(at))
            plgpu.wgmma_wait(1)
            pl.when(n > 0)(lambda: release(free, at - 1, slots))

        total = acc[...]
        release(free, first + steps - 1, slots)
        return total

    return pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, a: jax.Array, b: jax.Array, chip: Chip, interpret: Any = None) -> jax.Array:
    """The kernel; the gradient of x is the same kernel, (dy b^T) a, those of a and b are GEMMs that XLA makes."""
    return fused(x, a, b, chip, interpret)


def _forward(x: jax.Array, a: jax.Array, b: jax.Array, chip: Chip, interpret: Any) -> tuple[jax.Array, Any]:
    return product(x, a, b, chip, interpret), (x, a, b)


def _backward(chip: Chip, interpret: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b = kept
    h, dh = x @ a.T, dy @ b.T
    return fused(dy, b, a, chip, interpret), dh.T @ x, h.T @ dy


product.defvjp(_forward, _backward)
