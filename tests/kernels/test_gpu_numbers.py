"""Numbers of the Hopper kernels without a GPU: in interpret mode, and tile by tile on the host."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, block_sparse, hopper_tiles, low_rank, monarch
from pallas_kernels.block_sparse import gpu as block_sparse_gpu
from pallas_kernels.low_rank import gpu as low_rank_gpu
from pallas_kernels.monarch import gpu as monarch_gpu
from tests.marks import thinned

H100 = CHIPS["h100"]
KERNELS = {"block_sparse": block_sparse_gpu, "monarch": monarch_gpu, "low_rank": low_rank_gpu}


def draw(*shapes, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def columns(rows):
    return jnp.asarray(rows, jnp.int32)


def interpreter(op):
    """GPU interpret mode, a chip so small that programs take several tiles or none and rings turn, and whether the mode
    can multiply transposed views.

    Before jax 0.12 it is private, cannot do that, and waits so busily that one program must do.
    """
    sms, memory = (1, 136) if op == "low_rank" else (3, 84)
    chip = dataclasses.replace(H100, sms=sms, vmem=memory * 1024)
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        params = pytest.importorskip(
            "jax._src.pallas.mosaic_gpu.interpret.params", reason="this jax has no GPU interpret mode where 0.10 has it"
        )
        return params.InterpretGPUParams(detect_races=True), dataclasses.replace(chip, sms=1), False
    return InterpretGPUParams(detect_races=True), chip, True


def races():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """After an exception the interpreter must be told to forget the kernel it was in."""
    yield
    try:
        from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state
    except ImportError:
        return
    reset_gpu_interpret_mode_state()


def far(got, want):
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    return np.abs(got - want).max() / np.abs(want).max()


ROWS = columns([[0, 2], [0, 3], [2, 3]])
"""Block row 1 is empty: its gradient of x is a sum of nothing."""
SMALL = {  # shapes of x, g and weights; the weights as the kernel takes them, and as the reference does
    "block_sparse": ([(70, 256), (70, 192), (3, 2, 64, 64)], lambda v: (v, ROWS), lambda v: (v, ROWS)),
    "monarch": (
        [(50, 128), (50, 256), (2, 64, 2, 32), (2, 2, 32, 128)],
        lambda right, left: (right.reshape(2, 64, 64), left.reshape(2, 64, 128)),
        lambda right, left: (right, left),
    ),
    "low_rank": ([(70, 256), (70, 192), (64, 256), (64, 192)], lambda a, b: (a, b), lambda a, b: (a, b)),
}


@pytest.mark.parametrize("op", SMALL)
def test_numbers_and_gradients(op):
    mode, chip, views = interpreter(op)
    if not views and op != "block_sparse":
        pytest.skip(
            "GPU interpret mode of this jax multiplies no transposed views, and slowly; jax 0.12's does both well"
        )
    sizes, flat, plain = SMALL[op]
    x, g, *weights = draw(*sizes)
    x = x if views else x[:50]
    wide = [v.astype(jnp.float32) for v in (x, *weights)]
    ours = lambda x, *w: KERNELS[op].product(x, *flat(*w), chip, mode)
    reference = {"block_sparse": block_sparse, "monarch": monarch, "low_rank": low_rank}[op].reference
    expected, pull_reference = jax.vjp(lambda x, *w: reference(x, *plain(*w)), *wide)
    y, pull = jax.vjp(ours, x, *weights)
    assert y.dtype == jnp.bfloat16 and far(y, expected) < 1e-2 and not races()
    for got, want in zip(pull(g), pull_reference(g.astype(jnp.float32))) if views else ():
        assert got.dtype == jnp.bfloat16 and far(got, want) < 1e-2 and not races()


def walked(walk, tile, a, b, indices, out, sms, interpret):
    """What `hopper.walk_product` computes, tile by tile, and what it promises: aligned places, every entry once."""
    a, b, indices = (np.asarray(a, np.float32), np.asarray(b, np.float32), [np.asarray(v) for v in indices])
    y, depth = np.full(out, np.nan, np.float32), hopper_tiles.DEPTH

    def part(matrix, place, shape):
        row, column = map(int, place)
        assert row % 64 == 0 and column % min(shape[1], 64) == 0
        found = matrix[row : row + shape[0], column : column + shape[1]]
        assert found.shape == shape
        return found

    for i, j in itertools.product(*map(range, walk.grid)):
        i, j = jnp.int32(i), jnp.int32(j)
        steps = [jnp.int32(at) for at in range(*map(int, walk.span(indices, i, j)))]
        for group in range(tile.groups):
            total = np.zeros((tile.rows, tile.columns), np.float32)
            for at in steps:
                tall = (depth, tile.rows) if walk.flip_a else (tile.rows, depth)
                left = part(a, walk.a(indices, i, j, at, group), tall)
                wide = (tile.columns, depth) if walk.flip_b else (depth, tile.columns)
                right = part(b, walk.b(indices, i, j, at), wide)
                total += (left.T if walk.flip_a else left) @ (right.T if walk.flip_b else right)
            for column in range(0, tile.columns, tile.chunk):
                piece = part(y, walk.out(i, j, jnp.int32(group), column), (tile.rows, tile.chunk))
                assert np.isnan(piece).all()
                piece[...] = total[:, column : column + tile.chunk]
    assert not np.isnan(y).any()
    return jnp.asarray(y)


WALKS = [
    ("block_sparse", [(130, 512), (130, 384), (2, 3, 128, 192)], columns([[0, 1, 3], [0, 2, 3]])),
    ("block_sparse", [(70, 256), (70, 192), (3, 2, 64, 64)], ROWS),
    ("monarch", [(70, 384), (70, 512), (3, 128, 4, 64), (4, 3, 64, 128)], None),
    ("monarch", [(200, 256), (200, 256), (4, 64, 4, 16), (4, 4, 16, 64)], None),
]


@pytest.mark.parametrize(("op", "sizes", "rows"), thinned(WALKS, 2), ids=str)
def test_walks_sum_what_they_should(op, sizes, rows, monkeypatch):
    """Tiles of real sizes, both directions: what interpret mode would take minutes for, or cannot do."""
    monkeypatch.setattr(KERNELS[op], "walk_product", walked)
    x, g, *weights = draw(*sizes, dtype=jnp.float32)
    if op == "block_sparse":
        taken, reference = (*weights, rows), lambda x, v: block_sparse.reference(x, v, rows)
    else:
        (right, left), reference = weights, monarch.reference
        taken = right.reshape(*right.shape[:2], -1), left.reshape(left.shape[0], -1, left.shape[3])
    y, kept = KERNELS[op]._forward(x, *taken, H100, None)
    expected, pull = jax.vjp(reference, x, *weights)
    assert far(y, expected) < 1e-5
    for got, want in zip(KERNELS[op]._backward(H100, None, kept, g), pull(g)):
        assert far(got.reshape(want.shape), want) < 1e-5
