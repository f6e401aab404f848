"""The product with sums of Kronecker products: kernel against definition, gradients, the rule, and TPU compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.kronecker import api, choose, configs, kronecker, reference
from tests.kernels.races import races, strict
from tests.marks import mostly_long, thinned

V5E = CHIPS["v5e"]
SHAPES = [  # rows, terms, n1, n2, m1, m2
    (20, 1, 4, 128, 2, 256),
    (130, 2, 2, 256, 4, 128),
    (1, 1, 4, 128, 6, 128),
]


def problem(m, terms, n1, n2, m1, m2, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(m, n1 * n2), draw(terms, n1, m1), draw(terms, n2, m2) / 10, draw(m, m1 * m2)


def far(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    mostly_long(
        [(shape, *dtype) for shape in SHAPES for dtype in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2))],
        [(SHAPES[0], jnp.float32, 1e-5), (SHAPES[2], jnp.bfloat16, 2e-2)],
    ),
)
def test_kernel_and_gradients_equal_the_reference(shape, dtype, tolerance):
    *operands, g = problem(*shape, dtype=dtype)
    y, pull = jax.vjp(lambda *a: api.product(*a, V5E, True), *operands)
    expected, pull_reference = jax.vjp(reference, *(v.astype(jnp.float32) for v in operands))
    assert y.dtype == dtype and far(y, expected) < tolerance
    for got, want in zip(pull(g), pull_reference(g.astype(jnp.float32))):
        assert got.dtype == dtype and got.shape == want.shape and far(got, want) < tolerance


@pytest.mark.parametrize("cores", mostly_long([1, 2], [1]))
def test_races_and_uninitialised_memory(cores, capsys):
    x, a, b, g = problem(64, 1, 2, 128, 2, 128)
    mode = strict(2)
    tile = configs.Tiles(32, 8, 2**24, cores)
    expected, pull = jax.vjp(reference, x, a, b)
    assert far(api.tpu.forward(x, a, b, tile, mode), expected) < 1e-5
    for got, want in zip(api.tpu.backward(x, g, a, b, tile, mode), pull(g)):
        assert far(got, want) < 1e-5
    assert not races(capsys)


@pytest.mark.parametrize(("sizes",), thinned([((2, 5, 3, 7, 2),), ((1, 3, 5, 2, 7),), ((3, 2, 6, 6, 2),)], 3))
def test_xla_path_in_double_precision(sizes):
    with jax.enable_x64(True):
        *operands, g = problem(4, *sizes, dtype=jnp.float64)
        y, pull = jax.vjp(lambda *a: kronecker(*a, implementation="xla"), *operands)
        expected, want = jax.vjp(reference, *operands)
        for a, b in zip((y, *pull(g)), (expected, *want(g))):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("chip", "sizes", "said"),
    [
        ("v5e", (1, 32, 128, 32, 128), ""),
        ("v5p", (4, 8, 128, 8, 128), ""),
        ("v5e", (1, 64, 64, 64, 64), "minor factors of 64 x 64 are not multiples of 128 lanes"),
        ("v5e", (1, 3, 128, 4, 128), "major factors of 3 x 4 are not even"),
        ("v5e", (1, 100, 128, 100, 128), "1 rows of 100 x 100 are not whole sublanes of 16"),
        ("v5e", (1, 2, 8192, 2, 8192), "exceed"),
        ("cpu", (1, 32, 128, 32, 128), "cpu runs the XLA path"),
    ],
)
def test_the_rule_says_what_and_why(chip, sizes, said):
    choice = choose(1024, sizes, jnp.bfloat16, CHIPS[chip])
    assert choice.implementation == ("xla" if said else "pallas") and said in choice.unsupported
    assert f"kron {sizes[2]} x {sizes[4]}" in choice.reason


def test_few_rows_stay_with_xla():
    choice = choose(256, (1, 32, 128, 32, 128), jnp.bfloat16, V5E)
    assert choice.implementation == "xla" and not choice.unsupported and choice.reason.startswith("256 rows, fewer")


def test_nothing_is_gained_where_dense_waits_for_memory():
    choices = [choose(1024, (1, 8, 128, 8, 128), jnp.bfloat16, CHIPS[chip]) for chip in ("v5e", "v6e")]
    assert [c.implementation for c in choices] == ["pallas", "xla"] and not choices[1].unsupported
    assert "dense is bound by memory" in choices[1].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="pallas"), "no kernel on cpu"),
        (dict(b=jnp.zeros((2, 3, 5))), r"a must be \(terms, n1, m1\) and b \(terms, n2, m2\)"),
        (dict(x=jnp.zeros((2, 9))), "must end in 8"),
    ],
)
def test_bad_input(change, message):
    held = dict(x=jnp.ones((2, 8)), a=jnp.ones((1, 2, 3)), b=jnp.ones((1, 4, 5))) | change
    with pytest.raises(KernelError, match=message):
        kronecker(held.pop("x"), held.pop("a"), held.pop("b"), **held)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("sizes", [(1, 12, 128, 12, 128), (1, 32, 128, 32, 128), (2, 8, 256, 8, 256)], ids=str)
def test_compiles_for_every_tpu(topology, sizes):
    from structmat.parallel import topology_mesh

    terms, n1, n2, m1, m2 = sizes
    one = jax.sharding.Mesh(topology_mesh(topology).devices.reshape(-1)[:1], ("one",))
    shape = lambda *dims: jax.ShapeDtypeStruct(
        dims, jnp.bfloat16, sharding=jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    )

    def step(x, a, b, g):
        y, pull = jax.vjp(kronecker, x, a, b)
        return y, pull(g)

    with jax.set_mesh(one):
        lowered = jax.jit(step).lower(
            shape(1024, n1 * n2), shape(terms, n1, m1), shape(terms, n2, m2), shape(1024, m1 * m2)
        )
        fits = choose(1024, sizes, jnp.bfloat16, api.current_chip()).implementation == "pallas"
    kernels = lowered.compile().as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels == (2 if fits else 0) and (fits or topology.startswith("v4"))
