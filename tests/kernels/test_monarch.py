"""The two-stage product: kernel against definition, gradients, the rule, and compiles for TPUs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.monarch import api, choose, configs, monarch, reference
from tests.kernels.races import races, strict
from tests.marks import thinned

V5E = CHIPS["v5e"]
SHAPES = [  # rows, k, p, l, s, r
    (20, 2, 128, 2, 256, 128),
    (5, 2, 128, 4, 128, 64),
    (136, 3, 128, 2, 128, 128),
]


def problem(m, k, p, l, s, r, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return draw(m, k * p), draw(k, p, l, r), draw(l, k, r, s) / 10, draw(m, l * s)


def far(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


def kernel(x, right, left):
    (k, p, l, r), s = right.shape, left.shape[3]
    return api.product(x, right.reshape(k, p, l * r), left.reshape(l, k * r, s), V5E, True)


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance", "keep"),
    thinned([(s, *d) for s in SHAPES for d in ((jnp.float32, 1e-5, True), (jnp.bfloat16, 2e-2, False))], 3),
)
def test_kernel_and_gradients_equal_the_reference(shape, dtype, tolerance, keep, monkeypatch):
    """With the middle result kept for the backward pass, or made again."""
    monkeypatch.setattr(api, "keeps", lambda *_: keep)
    *operands, g = problem(*shape, dtype=dtype)
    y, pull = jax.vjp(kernel, *operands)
    expected, pull_reference = jax.vjp(reference, *(v.astype(jnp.float32) for v in operands))
    assert y.dtype == dtype and far(y, expected) < tolerance
    for got, want in zip(pull(g), pull_reference(g.astype(jnp.float32))):
        assert got.dtype == dtype and far(got, want) < tolerance


@pytest.mark.long
def test_groups_of_blocks_token_tiles_and_cores(monkeypatch):
    """Whole weights at once (all gradients by one kernel) and groups of them; loops unrolled or not; one core or two."""
    *operands, g = problem(300, 2, 128, 4, 128, 128)
    results = []
    for tile in (configs.Tiles(128, 1, 2**24), configs.Tiles(304, 2, 2**24), configs.Tiles(80, 4, 2**24, 2, 4, 2)):
        whole = tile.blocks == 4

        def pick(kind, *_, tile=tile, whole=whole):
            blocks = min(tile.blocks, 2) if kind == "backward_x" else tile.blocks
            return None if kind == "backward" and not whole else dataclasses.replace(tile, blocks=blocks)

        monkeypatch.setattr(api, "tiles", pick)
        y, pull = jax.vjp(kernel, *operands)
        results.append((y, *pull(g)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert far(a, b) < 1e-5


@pytest.mark.parametrize(
    "tile",
    [
        pytest.param(configs.Tiles(8, 1, 2**24), id="groups", marks=pytest.mark.long),
        pytest.param(configs.Tiles(8, 2, 2**24, cores=2), id="cores"),
    ],
)
def test_races_and_uninitialised_memory(tile, capsys):
    x, right, left, g = problem(32, 2, 128, 2, 128, 128)
    mode = strict(tile.cores)
    whole = tile.blocks == 2
    flat = right.reshape(2, 128, 256), left.reshape(2, 256, 128)
    expected, pull = jax.vjp(reference, x, right, left)
    wanted = pull(g)
    assert far(api.tpu.forward(x, *flat, tile, mode)[0], expected) < 1e-5
    assert far(api.tpu.forward(g, *flat, tile, mode, transposed=True)[0], wanted[0]) < 1e-5
    y, z = api.tpu.forward(x, *flat, tile, mode, keep=True)
    assert far(y, expected) < 1e-5
    found = api.tpu.backward(x, g, *flat, tile, whole, mode, z if whole else None)
    assert (found[0] is not None) == whole
    for got, want in list(zip(found, wanted))[not whole :]:
        assert far(got, want.reshape(got.shape)) < 1e-5
    assert not races(capsys)


def test_xla_path_in_double_precision():
    with jax.enable_x64(True):
        *operands, g = problem(4, 3, 5, 2, 7, 2, dtype=jnp.float64)
        y, pull = jax.vjp(lambda *a: monarch(*a, implementation="xla"), *operands)
        expected, want = jax.vjp(reference, *operands)
        for a, b in zip((y, *pull(g)), (expected, *want(g))):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("chip", "sizes", "said"),
    [
        ("v5e", (4, 1024, 4, 1024, 256), ""),
        ("v5e", (8, 512, 8, 512, 64), ""),
        ("v5e", (16, 256, 16, 256, 16), "slice rank 16 is neither 64 nor a multiple of 128"),
        ("v5e", (4, 192, 4, 768, 64), "not multiples of 128 lanes"),
        ("v5e", (3, 128, 4, 128, 64), "needs even numbers of blocks"),
        ("cpu", (4, 1024, 4, 1024, 256), "cpu runs the XLA path"),
    ],
)
def test_the_rule_says_what_and_why(chip, sizes, said):
    choice = choose(8192, sizes, jnp.bfloat16, CHIPS[chip])
    assert choice.implementation == ("xla" if said else "pallas") and said in choice.unsupported
    assert f"rank {sizes[-1]}" in choice.reason


def test_few_rows_stay_with_xla_unless_asked():
    choice = choose(1024, (8, 512, 8, 512, 64), jnp.bfloat16, V5E)
    assert (choice.implementation, choice.unsupported) == ("xla", "") and "24 MiB of activations" in choice.reason
    wide = (4, 1024, 4, 1024, 256)
    assert [choose(m, wide, jnp.bfloat16, V5E).implementation for m in (512, 1024)] == ["xla", "pallas"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="pallas"), "no kernel on cpu"),
        (dict(left=jnp.zeros((2, 3, 2, 5))), r"right must be \(k, p, l, r\) and left \(l, k, r, s\)"),
        (dict(x=jnp.zeros((2, 9))), "must end in 8"),
    ],
)
def test_bad_input(change, message):
    held = dict(x=jnp.ones((2, 8)), right=jnp.ones((2, 4, 3, 1)), left=jnp.ones((3, 2, 1, 5))) | change
    with pytest.raises(KernelError, match=message):
        monarch(held.pop("x"), held.pop("right"), held.pop("left"), **held)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("sizes", "topology"),
    [
        *[((8, 512, 8, 512, 64), t) for t in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")],
        ((4, 1024, 4, 1024, 256), "v5e:2x2"),
        ((8, 1024, 8, 1024, 128), "v6e:2x2"),
    ],
    ids=str,
)
def test_compiles_for_every_tpu(topology, sizes):
    from structmat.parallel import topology_mesh

    k, p, l, s, r = sizes
    one = jax.sharding.Mesh(topology_mesh(topology).devices.reshape(-1)[:1], ("one",))
    shape = lambda *dims: jax.ShapeDtypeStruct(
        dims, jnp.bfloat16, sharding=jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())
    )

    def step(x, right, left, g):
        y, pull = jax.vjp(monarch, x, right, left)
        return y, pull(g)

    with jax.set_mesh(one):
        lowered = jax.jit(step).lower(shape(4096, k * p), shape(k, p, l, r), shape(l, k, r, s), shape(4096, l * s))
    text = lowered.compile().as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    with jax.set_mesh(one):
        chip = api.current_chip()
        fits = choose(4096, sizes, jnp.bfloat16, chip).implementation == "pallas"
        together = configs.tiles("backward", chip, 4096, sizes, 2) is not None
    assert kernels == (3 - together if fits else 0) and (fits or topology.startswith("v4"))
