"""The Hopper kernels without a GPU: the rule, what they lower to, and their numbers in interpret mode."""

import dataclasses
import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError, block_sparse, hopper_tiles, low_rank, monarch
from pallas_kernels.block_sparse import gpu as block_sparse_gpu
from pallas_kernels.low_rank import gpu as low_rank_gpu
from pallas_kernels.monarch import gpu as monarch_gpu

H100 = CHIPS["h100"]
CUSTOM_CALL = "mosaic_gpu_v2"
KERNELS = {"block_sparse": block_sparse_gpu, "monarch": monarch_gpu, "low_rank": low_rank_gpu}


def draw(*shapes, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def shapes(*dims, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct(d, dtype) for d in dims]


def columns(rows):
    return jnp.asarray(rows, jnp.int32)


def text(function, *arguments):
    """The module for "cuda"; of the custom calls, whose bodies are bytes, names and operations can be read in it."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@pytest.fixture
def on_h100(monkeypatch):
    from pallas_kernels.block_sparse import api as block_sparse_api
    from pallas_kernels.low_rank import api as low_rank_api
    from pallas_kernels.monarch import api as monarch_api

    for api in (block_sparse_api, low_rank_api, monarch_api):
        monkeypatch.setattr(api, "current_chip", lambda: H100)


NAMES = {
    "block_sparse": ["block_sparse_forward", "block_sparse_backward_x", "block_sparse_backward_values"],
    "monarch": ["monarch_stage", "monarch_stage_transposed", "monarch_weights"],
    "low_rank": ["low_rank"],
}
REAL = [  # operation, x, weights, kernels in forward + backward
    ("block_sparse", (4096, 4096), [(32, 8, 128, 128)], 3),
    ("block_sparse", (64, 768), [(24, 3, 128, 128)], 3),
    ("monarch", (4096, 4096), [(4, 1024, 4, 256), (4, 4, 256, 1024)], 6),
    ("monarch", (512, 4096), [(16, 256, 16, 16), (16, 16, 16, 256)], 6),
    ("low_rank", (4096, 4096), [(128, 4096), (128, 4096)], 2),
    ("low_rank", (2, 100, 2048), [(256, 2048), (256, 8192)], 2),
]


@pytest.mark.parametrize(("op", "x", "weights", "kernels"), REAL, ids=str)
def test_lowers_for_cuda_forward_and_backward(on_h100, op, x, weights, kernels):
    """Rows that are no multiple of a tile, leading axes and narrow runs among them."""
    module = {"block_sparse": block_sparse, "monarch": monarch, "low_rank": low_rank}[op]
    apply = functools.partial(getattr(module, op), implementation="pallas")
    rest = [jnp.zeros(weights[0][:2], jnp.int32)] if op == "block_sparse" else []
    out = {"block_sparse": lambda w: w[0][0] * w[0][3], "monarch": lambda w: w[1][0] * w[1][3]}
    y = (*x[:-1], out.get(op, lambda w: w[1][1])(weights))

    def step(x, g, *weights):
        y, pull = jax.vjp(lambda x, *w: apply(x, *w, *rest), x, *weights)
        return y, pull(g)

    made = text(step, *shapes(x, y, *weights))
    assert made.count(CUSTOM_CALL) == kernels and "wgmma.mma_async" in made and "cp.async.bulk.tensor" in made
    for name in NAMES[op]:
        assert name in made


def test_under_vmap_remat_scan_and_shard_map():
    """vmap runs the kernel in a loop; under shard_map as structures call it."""
    kernel = lambda x, a, b: low_rank_gpu.product(x, a, b, H100)
    turn = jax.checkpoint(lambda c, ab: (c, jax.vmap(kernel, (0, None, 0))(c, *ab)))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    placed = functools.partial(jax.shard_map, mesh=mesh, in_specs=(split, whole), out_specs=whole, check_vma=False)
    stacked = placed(lambda x, ab: jax.lax.scan(turn, x, ab)[1])
    loss = lambda x, ab: stacked(x, ab).astype(jnp.float32).sum()
    x, a, b = shapes((3, 64, 128), (2, 64, 128), (2, 3, 64, 128))
    module = text(jax.value_and_grad(loss, (0, 1)), x, (a, b))
    assert module.count(CUSTOM_CALL) == 2 and module.count("stablehlo.while") == 4


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


@pytest.mark.parametrize(("op", "sizes", "rows"), WALKS, ids=str)
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


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("op", "m", "sizes", "dtype", "refused"),
    [
        ("block_sparse", 64, (4096, (32, 8, 128, 128)), BF16, ""),
        ("block_sparse", 64, (4096, (32, 8, 128, 32)), BF16, "blocks 128 x 32 are not multiples of 64"),
        ("block_sparse", 64, (4096, (32, 8, 128, 128)), F32, "dtype float32 is not bfloat16"),
        ("block_sparse", 0, (4096, (32, 8, 128, 128)), BF16, "x has no rows"),
        ("monarch", 64, ((16, 256, 16, 256, 16),), BF16, ""),
        ("monarch", 64, ((16, 128, 16, 128, 8),), BF16, "slice rank 8 is not a multiple of 16"),
        ("monarch", 64, ((3, 96, 4, 128, 32),), BF16, "p = 96 is not a multiple of 64"),
        ("low_rank", 64, ((4096, 256, 1024),), BF16, ""),
        ("low_rank", 64, ((4096, 320, 1024),), BF16, "rank 320 is not one of 64, 128, 192, 256"),
        ("low_rank", 64, ((4096, 64, 1000),), BF16, "4096 x 1000 are not multiples of 64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chip", ["h100", "h200"])
def test_the_rule_takes_xla_and_says_why(chip, op, m, sizes, dtype, refused):
    module = {"block_sparse": block_sparse, "monarch": monarch, "low_rank": low_rank}[op]
    choice = module.choose(m, *sizes, dtype, CHIPS[chip])
    assert choice.implementation == "xla" and choice.unsupported == refused
    assert choice.reason.startswith(f"no kernel: {refused}" if refused else "not yet measured on this chip; ask for")
    assert choice.flop_reduction > 1 and f"bound {choice.bound:.3g}x over dense" in choice.reason


@pytest.mark.parametrize("chip", ["v5e", "v6e", "cpu"])
def test_low_rank_is_left_to_xla_elsewhere(chip):
    choice = low_rank.choose(64, (4096, 128, 4096), BF16, CHIPS[chip])
    assert choice.implementation == "xla" and choice.flop_reduction == 16
    said = "cpu runs the XLA path" if chip == "cpu" else "XLA fuses both products"
    assert choice.unsupported.startswith(said) and said in choice.reason


def test_other_gpus_have_no_kernels():
    choice = low_rank.choose(64, (4096, 128, 4096), BF16, dataclasses.replace(H100, name="a100", sms=0))
    assert choice.unsupported == "a100 runs the XLA path; the kernels are for h100 and h200"


def test_what_is_not_supported_is_an_error_when_asked_for(on_h100):
    x, a, b = draw((8, 128), (8, 128), (8, 128))
    with pytest.raises(
        KernelError, match="no kernel on h100: rank 8 is not one of 64, 128, 192, 256; implementation=None would"
    ):
        low_rank.low_rank(x, a, b, implementation="pallas")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a=jnp.ones((4, 8))), r"a must be \(r, n\) and b \(r, m\), got \(4, 8\) and \(3, 5\)"),
        (dict(b=jnp.ones(3)), r"a must be \(r, n\)"),
        (dict(x=jnp.ones((2, 9))), r"x of shape \(2, 9\) must end in 8"),
        (dict(x=jnp.float32(1)), r"x of shape \(\) must end in 8"),
        (dict(implementation="palas"), "did you mean 'pallas'"),
    ],
)
def test_bad_input_of_low_rank(change, message):
    held = dict(x=jnp.ones((2, 8)), a=jnp.ones((3, 8)), b=jnp.ones((3, 5))) | change
    with pytest.raises(KernelError, match=message):
        low_rank.low_rank(held.pop("x"), held.pop("a"), held.pop("b"), **held)


def test_low_rank_by_xla_equals_the_reference_and_is_transposable():
    x, a, b = draw((2, 3, 8), (3, 8), (3, 5), dtype=jnp.float32)
    np.testing.assert_allclose(
        low_rank.low_rank(x, a, b), low_rank.reference(x.reshape(6, 8), a, b).reshape(2, 3, 5), 1e-5
    )
    back = jax.linear_transpose(lambda x: low_rank.low_rank(x, a, b), x)(jnp.ones((2, 3, 5)))[0]
    np.testing.assert_allclose(back, jnp.ones((2, 3, 5)) @ (a.T @ b).T, 1e-5, 1e-5)


def test_tiles_fit_shared_memory_and_rings_turn():
    """A ring of one slot would wait for itself: a slot is given back one step later."""
    for chunk in (16, 32, 64):
        for tile in hopper_tiles.candidates(chunk, H100.vmem):
            assert (
                tile.slots >= 2 and tile.slots * tile.slot_bytes + tile.out_bytes <= H100.vmem - hopper_tiles.BARRIERS
            )
    for m in (1, 64, 512, 4096, 16384):
        for rank in (64, 128, 192, 256):
            for width in (64, 1024, 8192):
                tile = low_rank_gpu.tile_of(H100, m, width, rank, width)
                held = tile.groups * 64 * (rank + 128) + tile.slots[1] * 64 * tile.columns
                held += tile.slots[0] * 64 * (64 * tile.groups + rank)
                assert min(tile.slots) >= 2 and 2 * held <= H100.vmem - hopper_tiles.BARRIERS
                assert width % (tile.columns * tile.splits) == 0
