"""Low rank plus block sparse: kernel against definition, gradients, the rule, and compiles for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.block_sparse.configs import Tiles
from pallas_kernels.low_rank_plus_block_sparse import api, choose, low_rank_plus_block_sparse, reference
from tests.marks import thinned

V5E = CHIPS["v5e"]
SHAPES = [  # rows, block rows, columns, blocks per column, p, s, rank
    (1, 2, 2, 1, 128, 128, 8),
    (40, 4, 3, 2, 128, 256, 100),
]


def problem(m, block_rows, columns, count, p, s, rank, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.stack([np.sort(rng.choice(block_rows, count, replace=False)) for _ in range(columns)])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    factors = draw(rank, block_rows * p) / 16, draw(rank, columns * s)
    weights = *factors, draw(columns, count, p, s), jnp.asarray(rows, jnp.int32)
    return draw(m, block_rows * p), *weights, draw(m, columns * s)


def far(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def with_gradients(function, operands, rows, g):
    y, pull = jax.vjp(lambda x, a, b, v: function(x, a, b, v, rows), *operands)
    return y, *pull(g)


def kernel(*operands):
    return api.product(*operands, V5E, True)


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    thinned([(s, *d) for s in SHAPES for d in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2))], 3),
)
def test_kernel_and_gradients_equal_the_reference(shape, dtype, tolerance):
    *operands, rows, g = problem(*shape, dtype=dtype)
    wide = [v.astype(jnp.float32) for v in (*operands, g)]
    want = with_gradients(reference, wide[:4], rows, wide[4])
    for got, expected in zip(with_gradients(kernel, operands, rows, g), want):
        assert got.dtype == dtype and far(got, expected) < tolerance


@pytest.mark.parametrize(("tokens", "columns"), [(128, 1), (304, 4)])
def test_several_token_tiles_and_column_groups(monkeypatch, tokens, columns):
    """The last token tile is ragged; narrow activations are made anew for each."""
    *operands, rows, g = problem(300, 2, 4, 1, 128, 128, 16)
    monkeypatch.setattr(api, "tiles", lambda *_: Tiles(tokens, columns, 2**24))
    want = with_gradients(reference, operands, rows, g)
    for got, expected in zip(with_gradients(kernel, operands, rows, g), want):
        assert far(got, expected) < 1e-5


def test_races_and_uninitialised_memory():
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    x, a, b, values, rows, g = problem(16, 2, 2, 1, 128, 128, 16)
    tile = Tiles(8, 1, 2**24)
    y, h = api.tpu.forward(x, a, b, values, rows.reshape(-1), tile, mode)
    dx, dh = api.tpu.backward_x(g, a, b, values, rows.reshape(-1), tile, mode)
    expected, expected_dx, *_ = with_gradients(reference, (x, a, b, values), rows, g)
    for got, want in ((y, expected), (dx, expected_dx), (h, x @ a.T), (dh, g @ b.T)):
        assert far(got, want) < 1e-5


def test_xla_path_in_double_precision():
    with jax.enable_x64(True):
        *operands, rows, g = problem(4, 3, 2, 2, 8, 4, 3, dtype=jnp.float64)
        ours = lambda *o: low_rank_plus_block_sparse(*o, implementation="xla")
        for a, b in zip(with_gradients(ours, operands, rows, g), with_gradients(reference, operands, rows, g)):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_under_jit_remat_and_vmap():
    x, a, b, values, rows, _ = problem(16, 2, 2, 1, 128, 128, 16)
    loss = lambda x, a: jnp.sum(jnp.sin(kernel(x, a, b, values, rows)))
    slope = jax.grad(loss, (0, 1))
    plain = slope(x, a)
    for wrapped in (jax.jit(slope), jax.grad(jax.checkpoint(loss), (0, 1))):
        jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, atol=1e-4), wrapped(x, a), plain)
    mapped = jax.vmap(slope, (0, None))(x.reshape(2, 8, -1), a)
    np.testing.assert_allclose(mapped[0].reshape(plain[0].shape), plain[0], atol=1e-4)
    np.testing.assert_allclose(mapped[1].sum(0), plain[1], atol=1e-3)


GRID = (32, 4, 128, 128)


@pytest.mark.parametrize(
    ("chip", "rank", "grid", "said", "implementation"),
    [
        ("v5e", 128, GRID, "rank 128, density 0.125, blocks 128 x 128, bound 8.52x", "pallas"),
        ("v6e", 64, (16, 2, 256, 256), "rank 64, density 0.125, blocks 256 x 256", "pallas"),
        ("v6e", 64, GRID, "half of 256-wide matrix units", "xla"),
        ("v5e", 512, GRID, "rank above 256, where one pass no longer pays: rank 512", "xla"),
        ("v5e", 128, (64, 8, 64, 64), "64 x 64 are not multiples of 128", "xla"),
        ("v5e", 1, GRID, "rank 1; Mosaic multiplies", "xla"),
        ("cpu", 128, GRID, "cpu runs both terms one after the other", "xla"),
        ("h100", 128, GRID, "h100 runs both terms one after the other", "xla"),
    ],
)
def test_the_rule_says_what_and_why(chip, rank, grid, said, implementation):
    choice = choose(2048, 4096, rank, grid, jnp.bfloat16, CHIPS[chip])
    assert choice.implementation == implementation and said in choice.reason
    assert choice.flop_reduction == pytest.approx(1 / (0.125 + 2 * rank / 4096))


def test_factors_take_room_from_the_panels():
    choice = lambda rank: choose(2048, 4096, rank, GRID, jnp.bfloat16, CHIPS["v4"])
    assert choice(8).implementation == "pallas"
    assert choice(512).implementation == "xla" and "rank 512 do not fit" in choice(512).unsupported


def test_a_rank_too_large_to_pay_still_runs_when_asked_for():
    assert not choose(2048, 4096, 512, GRID, jnp.bfloat16, V5E).unsupported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="pallas"), "no kernel on cpu"),
        (dict(a=jnp.ones((2, 9))), r"a must be \(r, 8\) and b \(r, 12\), got \(2, 9\) and \(2, 12\)"),
        (dict(b=jnp.ones((3, 12))), r"got \(2, 8\) and \(3, 12\)"),
        (dict(rows=jnp.full((3, 1), 2, jnp.int32)), r"rows name block rows 2..2; valid are 0..1"),
    ],
)
def test_bad_input(change, message):
    held = dict(
        x=jnp.ones((2, 8)),
        a=jnp.ones((2, 8)),
        b=jnp.ones((2, 12)),
        values=jnp.ones((3, 1, 4, 4)),
        rows=jnp.zeros((3, 1), jnp.int32),
    )
    with pytest.raises(KernelError, match=message):
        low_rank_plus_block_sparse(**held | change)


MODELS = [(1024, 768, 3072, 128, 0.5, 32), (2048, 4096, 4096, 128, 0.125, 128), (2048, 8192, 8192, 256, 0.125, 256)]
"""Tokens, K, N, block, density, rank: the up projection of GPT-2 small, and square layers of 7B and 70B models."""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_structure_compiles_for_every_tpu(topology, model):
    """A bare pair through the sum, or the kernel asked for where the rule leaves it aside: three kernels, and none of
    block_sparse's own forward."""
    import structmat
    from structmat.parallel import topology_mesh

    m, k, n, block, density, rank = model
    bound = structmat.parse(f"block_sparse(block={block}, density={density}) + low_rank(rank={rank})").bind(k, n)
    one = jax.sharding.Mesh(topology_mesh(topology).devices.reshape(-1)[:1], ("one",))
    whole = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole)
    params = jax.tree.map(place, jax.eval_shape(lambda key: bound.init(key, jnp.bfloat16), jax.random.key(0)))
    x, g = (place(jax.ShapeDtypeStruct((m, width), jnp.bfloat16)) for width in (k, n))

    def asked(params, x):
        sparse, thin = params["0"], params["1"]
        return api.low_rank_plus_block_sparse(
            x, thin["a"], thin["b"], sparse["values"], sparse["rows"], implementation="pallas"
        )

    def step(params, x, g):
        y, pull = jax.vjp(asked if narrow else bound.matmul, params, x)
        return y, pull(g)

    with jax.set_mesh(one):
        grid, chip = (bound.terms[0].grid[1], bound.terms[0].count, block, block), api.current_chip()
        choice, narrow = choose(m, k, rank, grid, jnp.bfloat16, chip), block < chip.lanes
        text = jax.jit(step).lower(params, x, g).compile().as_text()
    assert (choice.implementation == "xla") == (narrow or bool(choice.unsupported))
    assert not choice.unsupported or topology.startswith("v4")
    if not choice.unsupported:
        assert text.count('custom_call_target="tpu_custom_call"') == 3
        for name in ("plus_block_sparse_forward", "plus_block_sparse_backward_x", "block_sparse_backward_values"):
            assert name in text
