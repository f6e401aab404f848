"""The block-diagonal product: kernel against definition, gradients, the rule, and compiles for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.block_diagonal import api, block_diagonal, choose, configs, reference
from tests.marks import thinned

V5E = CHIPS["v5e"]
SHAPES = [  # rows, k, p, s
    (1, 2, 128, 256),
    (530, 3, 128, 128),
    (9, 4, 32, 64),
]


def problem(m, k, p, s, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(m, k * p), draw(k, p, s), draw(m, k * s)


def far(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def kernel(x, blocks):
    return api.product(x, blocks, V5E, True)


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    thinned([(s, *d) for s in SHAPES for d in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2))], 3),
)
def test_kernel_and_gradients_equal_the_reference(shape, dtype, tolerance):
    *operands, g = problem(*shape, dtype=dtype)
    y, pull = jax.vjp(kernel, *operands)
    expected, pull_reference = jax.vjp(reference, *(v.astype(jnp.float32) for v in operands))
    assert y.dtype == dtype and far(y, expected) < tolerance
    for got, want in zip(pull(g), pull_reference(g.astype(jnp.float32))):
        assert got.dtype == dtype and far(got, want) < tolerance


@pytest.mark.parametrize(("tokens", "blocks", "join"), [(128, 2, 2), (304, 4, 4)])
def test_groups_of_blocks_and_token_tiles(monkeypatch, tokens, blocks, join):
    """The last token tile is ragged, and how many blocks are joined does not matter."""
    *operands, g = problem(300, 4, 64, 64)
    monkeypatch.setattr(api, "tiles", lambda *_: configs.Tiles(tokens, blocks, join, 2**24))
    y, pull = jax.vjp(kernel, *operands)
    expected, want = jax.vjp(reference, *operands)
    for a, b in zip((y, *pull(g)), (expected, *want(g))):
        assert far(a, b) < 1e-5


def test_races_and_uninitialised_memory():
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    x, blocks, g = problem(16, 4, 64, 64)
    tile = configs.Tiles(8, 2, 2, 2**24)
    expected, pull = jax.vjp(reference, x, blocks)
    assert far(api.tpu.forward(x, blocks, tile, mode), expected) < 1e-5
    for got, want in zip(api.tpu.backward(x, g, blocks, tile, mode), pull(g)):
        assert far(got, want) < 1e-5


def test_xla_path_in_double_precision():
    with jax.enable_x64(True):
        *operands, g = problem(4, 3, 5, 7, dtype=jnp.float64)
        y, pull = jax.vjp(lambda *a: block_diagonal(*a, implementation="xla"), *operands)
        expected, want = jax.vjp(reference, *operands)
        for a, b in zip((y, *pull(g)), (expected, *want(g))):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_leading_axes_are_rows():
    x, blocks, _ = problem(6, 3, 5, 7)
    y = block_diagonal(x.reshape(2, 3, 15), blocks)
    assert y.shape == (2, 3, 21) and far(y.reshape(6, 21), reference(x, blocks)) < 1e-5


def test_under_jit_remat_scan_and_vmap():
    x, blocks, _ = problem(8, 2, 64, 64)
    slope = jax.grad(lambda x, w: jnp.sum(jnp.sin(kernel(x, w))), (0, 1))
    plain = slope(x, blocks)
    remat = jax.grad(jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(kernel(x, w)))), (0, 1))
    for wrapped in (jax.jit(slope), remat):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wrapped(x, blocks), plain)
    rows = x.reshape(2, 4, 128), jnp.stack([blocks, blocks])
    for mapped in (jax.vmap(slope)(*rows), jax.lax.scan(lambda c, p: (c, slope(*p)), 0, rows)[1]):
        np.testing.assert_allclose(mapped[0].reshape(8, 128), plain[0], atol=1e-5)
        np.testing.assert_allclose(mapped[1].sum(0), plain[1], atol=1e-4)


@pytest.mark.parametrize(
    ("chip", "sizes", "said", "implementation"),
    [
        ("v5e", (16, 256, 256), "16 blocks of 256 x 256, bound 8.52x", "pallas"),
        ("v6e", (64, 64, 64), "64 blocks of 64 x 64", "pallas"),
        ("v5e", (3, 64, 128), "3 blocks of 64 x 128 do not join, 8 at most, into multiples of 128 lanes", "xla"),
        ("v5e", (2, 2048, 2048), "blocks of 2048 x 2048 are wider than 1024", "xla"),
        ("v5e", (128, 3, 3), "128 blocks of 3 x 3 do not join", "xla"),
        ("v5e", (2, 512, 192), "2 blocks of 512 x 192", "pallas"),
        ("v5e", (4, 448, 448), "2 blocks joined, zeros included, are bound by arithmetic", "xla"),
        ("v5e", (1, 1024, 1024), "one block is a dense matrix", "xla"),
        ("v4", (4, 1024, 1024), "backward: a block of 1024 x 1024 does not fit", "xla"),
        ("cpu", (16, 256, 256), "cpu runs the XLA path", "xla"),
        ("h100", (16, 256, 256), "h100 runs the XLA path", "xla"),
    ],
)
def test_the_rule_says_what_and_why(chip, sizes, said, implementation):
    choice = choose(2048, sizes, jnp.bfloat16, CHIPS[chip])
    assert choice.implementation == implementation and said in choice.reason and choice.flop_reduction == sizes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="pallas"), "no kernel on cpu"),
        (dict(blocks=jnp.zeros((2, 3))), r"blocks must be \(k, p, s\), got \(2, 3\)"),
        (dict(x=jnp.zeros((2, 9))), "must end in 8"),
    ],
)
def test_bad_input(change, message):
    held = dict(x=jnp.ones((2, 8)), blocks=jnp.ones((2, 4, 3))) | change
    with pytest.raises(KernelError, match=message):
        block_diagonal(held.pop("x"), held.pop("blocks"), **held)


MODELS = [(1024, 12, 64, 256), (512, 256, 16, 16), (2048, 16, 256, 256), (2048, 8, 1024, 1024)]
"""Tokens, k, p, s: the up projection of GPT-2 small, narrow blocks joined, and square layers of 7B and 70B models."""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_compiles_for_every_tpu(topology, model):
    from structmat.parallel import topology_mesh

    m, k, p, s = model
    one = jax.sharding.Mesh(topology_mesh(topology).devices.reshape(-1)[:1], ("one",))
    whole = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=whole)

    def step(x, blocks, g):
        y, pull = jax.vjp(block_diagonal, x, blocks)
        return y, pull(g)

    with jax.set_mesh(one):
        text = jax.jit(step).lower(shape(m, k * p), shape(k, p, s), shape(m, k * s)).compile().as_text()
        fits = choose(m, (k, p, s), jnp.bfloat16, api.current_chip()).implementation == "pallas"
    assert fits or (topology.startswith("v4") and p == 1024)
    assert text.count('custom_call_target="tpu_custom_call"') == (2 if fits else 0)
