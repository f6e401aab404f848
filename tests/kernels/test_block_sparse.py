"""The block-sparse product: kernel against definition, gradients, the rule, and compiles for every TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.block_sparse import api, block_sparse, choose, configs, reference
from tests.kernels.races import races, strict
from tests.marks import thinned

V5E = CHIPS["v5e"]
SHAPES = [  # rows, block rows, columns, blocks per column, p, s
    (1, 2, 2, 1, 128, 128),
    (40, 4, 3, 2, 128, 128),
    (300, 4, 4, 4, 128, 256),
]


def problem(m, block_rows, columns, count, p, s, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.stack([np.sort(rng.choice(block_rows, count, replace=False)) for _ in range(columns)])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(m, block_rows * p), draw(columns, count, p, s), jnp.asarray(rows, jnp.int32), draw(m, columns * s)


def far(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    thinned([(s, *d) for s in SHAPES for d in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2))], 3),
)
def test_kernel_and_gradients_equal_the_reference(shape, dtype, tolerance):
    x, values, rows, g = problem(*shape, dtype=dtype)
    wide = [v.astype(jnp.float32) for v in (x, values)]
    y, pull = jax.vjp(lambda x, v: api.product(x, v, rows, V5E, True), x, values)
    expected, pull_reference = jax.vjp(lambda x, v: reference(x, v, rows), *wide)
    assert y.dtype == dtype and far(y, expected) < tolerance
    for got, want in zip(pull(g), pull_reference(g.astype(jnp.float32))):
        assert got.dtype == dtype and far(got, want) < tolerance


@pytest.mark.long
def test_several_token_tiles_and_column_groups(monkeypatch):
    """The last token tile is ragged; groups are visited in order; results do not depend on the tiling."""
    x, values, rows, g = problem(300, 4, 4, 2, 128, 128)
    results = []
    for tokens, columns in ((128, 1), (128, 4), (304, 2)):
        monkeypatch.setattr(api, "tiles", lambda *_, t=tokens, c=columns: configs.Tiles(t, c, 2**24))
        y, pull = jax.vjp(lambda x, v: api.product(x, v, rows, V5E, True), x, values)
        results.append((y, *pull(g)))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            assert far(a, b) < 1e-5


def test_races_and_uninitialised_memory(capsys):
    """In TPU interpret mode, which fills memory with NaN and runs parallel axes in random order."""
    x, values, rows, g = problem(16, 2, 2, 1, 128, 128)
    mode = strict(2)
    tile = configs.Tiles(8, 1, 2**24)
    y = api.tpu.forward(x, values, rows.reshape(-1), tile, mode)
    dx = api.tpu.backward_x(g, values, rows.reshape(-1), x.shape[1], tile, mode)
    dw = api.tpu.backward_values(x, g, rows.reshape(-1), values.shape, tile, mode)
    want = jax.vjp(lambda x, v: reference(x, v, rows), x, values)[1](g)
    assert far(y, reference(x, values, rows)) < 1e-5
    assert far(dx, want[0]) < 1e-5 and far(dw, want[1]) < 1e-5
    assert not races(capsys)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2, 8, 4), (1, 2, 3, 1, 5, 7)])
def test_xla_path_in_double_precision(shape):
    with jax.enable_x64(True):
        x, values, rows, g = problem(*shape, dtype=jnp.float64)
        ours = lambda x, v: block_sparse(x, v, rows, implementation="xla")
        y, pull = jax.vjp(ours, x, values)
        expected, want = jax.vjp(lambda x, v: reference(x, v, rows), x, values)
        for a, b in zip((y, *pull(g)), (expected, *want(g))):
            np.testing.assert_allclose(a, b, atol=1e-12)


@functools.cache
def kernel_loss():
    x, values, rows, _ = problem(16, 2, 2, 1, 128, 128)
    loss = lambda x, v, rows: jnp.sum(jnp.sin(api.product(x, v, rows, V5E, True)))
    return x, values, rows, loss


def test_under_jit_remat_scan_and_vmap():
    x, values, rows, loss = kernel_loss()
    slope = jax.grad(loss, (0, 1))
    plain = slope(x, values, rows)
    for wrapped in (jax.jit(slope), jax.grad(jax.checkpoint(loss), (0, 1))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wrapped(x, values, rows), plain)
    stack = [jnp.stack([v, -v]) for v in (x, values)]
    scanned = jax.lax.scan(lambda c, p: (c, slope(*p, rows)), 0, tuple(stack))[1]
    vmapped = jax.vmap(slope, (0, 0, None))(*stack, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, vmapped)
    np.testing.assert_allclose(scanned[0][0], plain[0], atol=1e-5)


def test_forward_mode_is_refused():
    x, values, rows, loss = kernel_loss()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: loss(x, values, rows), (x,), (x,))


GRID = (32, 8, 128, 128)


@pytest.mark.parametrize(
    ("chip", "grid", "dtype", "said", "implementation"),
    [
        ("v5e", GRID, jnp.bfloat16, "density 0.25, blocks 128 x 128, bound 8.52x", "pallas"),
        ("v6e", GRID, jnp.bfloat16, "half of 256-wide matrix units", "xla"),
        ("v6e", (16, 4, 256, 256), jnp.bfloat16, "density 0.25, blocks 256 x 256", "pallas"),
        ("v5e", (64, 16, 64, 64), jnp.bfloat16, "64 x 64 are not multiples of 128", "xla"),
        ("v5e", GRID, jnp.float16, "float16 is neither", "xla"),
        ("cpu", GRID, jnp.bfloat16, "cpu runs the XLA path", "xla"),
    ],
)
def test_the_rule_says_what_and_why(chip, grid, dtype, said, implementation):
    choice = choose(2048, 4096, grid, dtype, CHIPS[chip])
    assert choice.implementation == implementation and said in choice.reason and choice.flop_reduction == 4
    assert bool(choice.unsupported) == (implementation == "xla" and "matrix units" not in said)


def test_panels_that_do_not_fit_are_left_to_xla():
    choice = choose(4096, 2**20, (8, 2, 128, 128), jnp.bfloat16, CHIPS["v4"])
    assert choice.implementation == "xla" and "does not fit" in choice.unsupported


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="pallas"), "no kernel on cpu: cpu runs the XLA path; implementation=None would use xla"),
        (dict(implementation="palas"), "got 'palas'; did you mean 'pallas'"),
        (dict(rows=jnp.zeros((3, 2), jnp.int32)), r"values must be \(C, R, p, s\) and rows \(C, R\)"),
        (dict(rows=jnp.zeros((3, 1))), "rows must be int32, got float32"),
        (dict(rows=jnp.full((3, 1), 2, jnp.int32)), r"rows name block rows 2..2; valid are 0..1"),
        (dict(x=jnp.ones((2, 9))), "does not end in whole blocks of 4"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=jnp.ones((2, 8)), values=jnp.ones((3, 1, 4, 4)), rows=jnp.zeros((3, 1), jnp.int32)) | change
    with pytest.raises(KernelError, match=message):
        block_sparse(arguments.pop("x"), arguments.pop("values"), arguments.pop("rows"), **arguments)


MODELS = [(4096, 768, 3072, 128, 0.5), (2048, 4096, 4096, 128, 0.25), (2048, 8192, 8192, 256, 0.125)]
"""Tokens, K, N, block, density: the up projection of GPT-2 small, and square layers of 7B and 70B models."""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_compiles_for_every_tpu(topology, model):
    from structmat.parallel import topology_mesh

    m, k, n, block, density = model
    count = round(density * k / block)
    mesh = topology_mesh(topology)
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    arguments = shape(m, k), shape(n // block, count, block, block), shape(n // block, count, dtype=jnp.int32)

    def step(x, values, rows, g):
        y, pull = jax.vjp(lambda x, v: block_sparse(x, v, rows, implementation="pallas"), x, values)
        return y, pull(g)

    one = jax.sharding.Mesh(mesh.devices.reshape(-1)[:1], ("one",))
    with jax.set_mesh(one):
        whole = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole)
        compiled = jax.jit(step).lower(*map(place, (*arguments, shape(m, n)))).compile()
    text = compiled.as_text()
    for name in ("forward", "backward_x", "backward_values"):
        assert f"block_sparse_{name}" in text
    assert text.count('custom_call_target="tpu_custom_call"') == 3
