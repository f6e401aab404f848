"""The one matrix kernel all Hopper products are made of: a sum of tile products whose places are given by functions.

A persistent grid of one CTA per streaming multiprocessor. One warpgroup keeps a ring of shared-memory slots filled by TMA,
the others multiply with wgmma; both run through the same tiles without draining the ring between them, so that the next
tile is on its way while the last one is stored. Written after NVIDIA's description of the chip and not yet run on one:
its lowering is tested, and its numbers in interpret mode.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_tiles import DEPTH, PIECE, Tile

Place = tuple[Any, Any]
"""First row and first column of a tile in a matrix."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which tiles are multiplied and where the sum goes; all indices are traced int32 scalars.

    Attributes:
      name: of the kernel.
      grid: (tiles down, tiles across) of the output.
      span: (indices, i, j) -> (first, end) of the steps that tile (i, j) sums.
      a: (indices, i, j, step, group) -> where the left operand of a warpgroup lies: (rows, 64), or (64, rows) flipped.
      b: (indices, i, j, step) -> where the right operand lies: (64, columns), or (columns, 64) flipped.
      out: (i, j, group, column) -> where in the output `tile.chunk` columns of a warpgroup go, from `column` on.
      flip_a: the left operand is stored transposed. flip_b: the right one is.
    """

    name: str
    grid: tuple[int, int]
    span: Callable[[Sequence[Any], Any, Any], tuple[Any, Any]]
    a: Callable[..., Place]
    b: Callable[..., Place]
    out: Callable[[Any, Any, Any, int], Place]
    flip_a: bool = False
    flip_b: bool = False


def walk_product(
    walk: Walk,
    tile: Tile,
    a: jax.Array,
    b: jax.Array,
    indices: Sequence[jax.Array],
    out: tuple[int, int],
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """The matrix `out` in the dtype of a, summed in f32; every entry must belong to exactly one tile of the walk.

    Args:
      a, b: matrices in bfloat16. indices: int32 vectors, read by the walk's functions. sms: multiprocessors of the chip.
    """
    down, across = walk.grid
    programs = min(sms, down * across)

    def entry(a_gmem, b_gmem, *rest):
        held, out_gmem = rest[:-1], rest[-1]
        pl.run_scoped(
            functools.partial(_program, walk, tile, programs, (a_gmem, b_gmem, held, out_gmem)),
            a_smem=smem((tile.slots, tile.groups, *_shape(tile.rows, walk.flip_a)), a.dtype),
            b_smem=smem((tile.slots, *_shape(tile.columns, not walk.flip_b)), b.dtype),
            out_smem=smem((tile.groups, 2, PIECE, tile.chunk), a.dtype),
            full=plgpu.Barrier(num_arrivals=tile.groups + 1, num_barriers=tile.slots),
            free=plgpu.Barrier(num_arrivals=tile.groups, num_barriers=tile.slots),
            collective_axes="warpgroup",
        )

    kernel = launch(walk.name, entry, jax.ShapeDtypeStruct(out, a.dtype), programs, tile.groups, interpret)
    return kernel(a, b, *indices)


def _program(walk: Walk, tile: Tile, programs: int, gmem: Any, *, a_smem, b_smem, out_smem, full, free) -> None:
    a_gmem, b_gmem, indices, out_gmem = gmem
    down, across = walk.grid
    high = max(d for d in range(1, 9) if down % d == 0)
    me, group = lax.axis_index("sm"), lax.axis_index("warpgroup")

    def tiles(body: Callable[..., Any]) -> Any:
        """`body(i, j, step) -> step` over this program's tiles; `step` counts the slots of the ring used, here in all.

        Down a strip `high` tiles high first, then across it: programs at work together share operands in L2.
        """

        def one(n: Any, step: Any) -> Any:
            at = me + n * programs
            inside = lax.rem(at, jnp.int32(high * across))
            i = lax.div(at, jnp.int32(high * across)) * high + lax.rem(inside, jnp.int32(high))
            return body(i, lax.div(inside, jnp.int32(high)), step)

        mine = lax.div(jnp.int32(down * across - 1) - me, jnp.int32(programs)) + 1
        return lax.fori_loop(jnp.int32(0), mine, one, jnp.int32(0))

    @pl.when(group == tile.groups)
    def _():
        registers(tile.groups, False)

        def load(i: Any, j: Any, step: Any) -> Any:
            def fill(at: Any, step: Any) -> Any:
                slot = claim(free, step, tile.slots)
                for g in range(tile.groups):
                    source = part(a_gmem, walk.a(indices, i, j, at, g), _shape(tile.rows, walk.flip_a))
                    plgpu.copy_gmem_to_smem(source, a_smem.at[slot, g], full.at[slot])
                source = part(b_gmem, walk.b(indices, i, j, at), _shape(tile.columns, not walk.flip_b))
                plgpu.copy_gmem_to_smem(source, b_smem.at[slot], full.at[slot])
                return step + 1

            return lax.fori_loop(*walk.span(indices, i, j), fill, step)

        drain(free, tiles(load), tile.slots)

    @pl.when(group < tile.groups)
    def _():
        registers(tile.groups, True)

        def multiply(i: Any, j: Any, step: Any) -> Any:
            first, end = walk.span(indices, i, j)

            def scope(acc: Any) -> Any:
                def dot(at: Any, step: Any) -> Any:
                    slot = lax.rem(step, jnp.int32(tile.slots))
                    plgpu.barrier_wait(full.at[slot])
                    left, right = a_smem.at[slot, group], b_smem.at[slot]
                    plgpu.wgmma(acc, flipped(left, walk.flip_a), flipped(right, walk.flip_b))
                    plgpu.wgmma_wait(1)
                    pl.when(at > first)(lambda: release(free, step - 1, tile.slots))
                    return step + 1

                done = lax.fori_loop(first, end, dot, step)
                total = acc[...]
                pl.when(end > first)(lambda: release(free, done - 1, tile.slots))
                return total, done

            total, done = pl.run_scoped(scope, plgpu.ACC((tile.rows, tile.columns), jnp.float32))
            place = lambda row, column: _below(walk.out(i, j, group, column), row)
            store(total.astype(out_gmem.dtype), out_smem.at[group], out_gmem, place)
            return done

        tiles(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store(total: jax.Array, pieces: Any, out_gmem: Any, place: Callable[[int, int], Place]) -> None:
    """Write a warpgroup's sums (rows, columns) by pieces (2, 64, chunk) of shared memory, one filled as the other is sent.

    `place(row, column)` says where in the output the piece goes that begins at `row`, `column` of the sums.
    """
    (rows, columns), chunk = total.shape, pieces.shape[-1]
    corners = [(row, column) for row in range(0, rows, PIECE) for column in range(0, columns, chunk)]
    for n, (row, column) in enumerate(corners):
        piece = pieces.at[n % 2]
        plgpu.wait_smem_to_gmem(1 if len(corners) % 2 == 0 else 0, wait_read_only=True)
        piece[...] = total[row : row + PIECE, column : column + chunk]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(piece, part(out_gmem, place(row, column), (PIECE, chunk)))


def launch(
    name: str, entry: Callable[..., None], out: Any, programs: int, groups: int, interpret: Any
) -> Callable[..., jax.Array]:
    """`entry(*inputs, output)` on `programs` CTAs of `groups` multiplying warpgroups and one that loads.

    Under vmap the launches follow each other.
    """
    keywords = {} if interpret is None else {"interpret": interpret}
    kernel = plgpu.kernel(
        entry,
        out_type=out,
        grid=(programs,),
        grid_names=("sm",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **keywords,
    )
    return jax.custom_batching.sequential_vmap(kernel)


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of matrices (..., rows, columns), tiled and swizzled as wgmma and TMA want them."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def registers(groups: int, multiplying: bool) -> None:
    """Move registers of the loading warpgroup to two multiplying ones; one has all it can use from the start."""
    if groups == 2:
        plgpu.set_max_registers(232 if multiplying else 40, action="increase" if multiplying else "decrease")


def claim(free: Any, step: Any, slots: int) -> Any:
    """The slot of a step, once its last use is over."""
    slot = lax.rem(step, jnp.int32(slots))
    pl.when(step >= slots)(lambda: plgpu.barrier_wait(free.at[slot]))
    return slot


def release(free: Any, step: Any, slots: int) -> None:
    """Say that this warpgroup has read the slot of a step."""
    plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(slots))])


def drain(free: Any, steps: Any, slots: int) -> None:
    """Wait until all of `steps` have been read: a barrier must not go with a phase that nobody saw."""

    @pl.loop(jnp.maximum(steps - slots, 0), steps)
    def _(step):
        plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(slots))])


def part(ref: Any, place: Place, shape: tuple[int, int]) -> Any:
    """The rectangle of a matrix in global memory; it begins at multiples of its sizes or of 64, which lowering must know."""
    row, column = (pl.multiple_of(at, math.gcd(size, DEPTH)) for at, size in zip(place, shape))
    return ref.at[pl.ds(row, shape[0]), pl.ds(column, shape[1])]


def flipped(ref: Any, flip: bool) -> Any:
    """The transposed view if `flip`."""
    return ref.transpose((1, 0)) if flip else ref


def _below(place: Place, row: int) -> Place:
    return place[0] + row, place[1]


def _shape(width: int, tall: bool) -> tuple[int, int]:
    return (DEPTH, width) if tall else (width, DEPTH)
