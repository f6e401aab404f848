"""The Hopper kernels without a GPU: the rule and what they lower to; their numbers are in test_gpu_numbers.py."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError, block_sparse, hopper_tiles, low_rank, monarch
from pallas_kernels.low_rank import gpu as low_rank_gpu

H100 = CHIPS["h100"]
CUSTOM_CALL = "mosaic_gpu_v2"


def draw(*shapes, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def shapes(*dims, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct(d, dtype) for d in dims]


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


def test_other_gpus_have_no_kernels():
    choice = low_rank.choose(64, (4096, 128, 4096), BF16, dataclasses.replace(H100, name="a100", sms=0))
    assert choice.unsupported == "a100 runs the XLA path; the kernels are for h100 and h200"


def test_what_is_not_supported_is_an_error_when_asked_for(on_h100):
    x, a, b = draw((8, 128), (8, 128), (8, 128))
    with pytest.raises(
        KernelError, match="no kernel on h100: rank 8 is not one of 64, 128, 192, 256; implementation=None would"
    ):
        low_rank.low_rank(x, a, b, implementation="pallas")


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
