"""The cost model of the block-sparse kernels' tiles: what it chooses, and that it behaves as a cost."""

import dataclasses
import itertools

import pytest

from pallas_kernels import CHIPS
from pallas_kernels.block_sparse.configs import seconds, tiles

KINDS = ("forward", "backward_x", "backward_values")
TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
DENSITIES = (0.0625, 0.125, 0.25, 0.5)
M, N, SIZE = 1024, 4096, 2  # tokens, width, bytes of a bfloat16


def grid(density, block=128, n=N):
    return n // block, round(density * n / block), block, block


def chosen(kind, chip, density=0.25, m=M, n=N):
    return tiles(kind, chip, m, n, grid(density, n=n), SIZE)


def cost(kind, chip, density=0.25, m=M, n=N):
    tile = chosen(kind, chip, density, m, n)
    return seconds(kind, chip, tile.tokens, tile.columns, m, n, grid(density, n=n), SIZE)


@pytest.mark.parametrize(
    ("kind", "tile", "worse"),
    [
        # All rows at once wait longest for the first x; quarters read the weights four times.
        ("forward", (512, 8), [(1024, 8), (256, 8), (512, 4)]),
        # Larger ones are kept out by a limit of their own.
        ("backward_x", (256, 8), [(128, 8), (256, 4)]),
        # All columns at once read x once, but nothing hides the store of their gradients; quarters read it four times.
        ("backward_values", (512, 16), [(512, 32), (1024, 16), (512, 8)]),
    ],
)
def test_tiles_of_a_quarter_of_blocks_of_128_on_v5e(kind, tile, worse):
    found = chosen(kind, CHIPS["v5e"])
    assert (found.tokens, found.columns) == tile
    took = lambda tokens, columns: seconds(kind, CHIPS["v5e"], tokens, columns, M, N, grid(0.25), SIZE)
    assert all(took(*tile) < took(*other) for other in worse)


@pytest.mark.parametrize("kind", KINDS)
def test_no_core_of_two_is_idle(kind):
    """The outer axis of the grid is split over the cores: token tiles, and column groups for the gradient of blocks."""
    chip = CHIPS["v5p"]
    assert chip.cores == 2
    for density in (0.25, 0.5):
        tile = chosen(kind, chip, density)
        assert (N // 128 // tile.columns if kind == "backward_values" else M // tile.tokens) % 2 == 0
    whole = (512, 32) if kind == "backward_values" else (1024, 8)
    alone = dataclasses.replace(chip, cores=1)
    one, two = (seconds(kind, c, *whole, M, N, grid(0.25), SIZE) for c in (alone, chip))
    assert two > 1.4 * one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TPUS)
def test_tiles_divide_the_product_and_fit_the_memory(name, kind):
    chip = CHIPS[name]
    for density, block in itertools.product(DENSITIES, (128, 256)):
        columns, count, p, s = grid(density, block)
        tile = tiles(kind, chip, M, N, (columns, count, p, s), SIZE)
        assert columns % tile.columns == 0 and M % tile.tokens == 0
        operands = tile.tokens * (N + tile.columns * s) + tile.columns * count * p * s
        assert 2 * SIZE * operands < 0.7 * chip.vmem and 2 * SIZE * operands < tile.vmem <= chip.vmem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TPUS)
def test_the_cost_grows_with_the_work_and_falls_with_what_the_chip_has(name, kind):
    chip = CHIPS[name]
    by_density = [cost(kind, chip, d) for d in DENSITIES]
    assert by_density == sorted(set(by_density))
    assert cost(kind, chip, m=M // 2) < cost(kind, chip) < cost(kind, chip, m=2 * M)
    assert cost(kind, chip, n=N // 2) < cost(kind, chip)
    for better in ({"flops": 2 * chip.flops, "bandwidth": 2 * chip.bandwidth}, {"vmem": 2 * chip.vmem}):
        assert cost(kind, dataclasses.replace(chip, **better)) <= cost(kind, chip)
    work = 2 * M * N * N * 0.25 / chip.flops
    assert work < cost(kind, chip) < 4 * max(work, 4 * M * N / chip.bandwidth)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_blocks_take_about_twice_as_long_where_arithmetic_bounds(kind):
    chip = CHIPS["v5e"]
    assert 1.6 < cost(kind, chip, 0.5) / cost(kind, chip, 0.25) < 2
    at = (kind, chip, 256, 8, M, N, grid(0.5))
    assert seconds(*at, 4) > 1.8 * seconds(*at, 2)
