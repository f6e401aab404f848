import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import sites
from structmat.nn.monarch_transform import MonarchTransform, bind_transform, dft_factors
from structmat.structures import StructureError, parse
from structmat.structures.block_low_rank import BlockLowRank
from tests.marks import mostly_long

KEY = jax.random.key(0)


def example(n, rows=3):
    rng = np.random.default_rng(n)
    return rng.normal(size=(rows, n)) + 1j * rng.normal(size=(rows, n))


def held(module, x):
    return nn.unbox(jax.jit(module.init)(KEY, x))


@pytest.mark.parametrize("n", [1, 7, 15, 27, 36, 42, 48, 64, 85, 168, 196, 512])
def test_factors_are_the_transform_by_definition(n):
    """Without jax: the two stages written out, against numpy's FFT, for every split of n."""
    x = example(n)
    for k in (k for k in range(1, n + 1) if n % k == 0 and k <= 16):
        for inverse, norm in ((False, "backward"), (True, "ortho"), (True, "backward"), (False, "forward")):
            f = dft_factors(n, k, inverse, norm)
            digits = x.reshape(3, n // k, k).transpose(0, 2, 1)
            z = np.einsum("mkp,kplr->mklr", digits, f["R"])
            y = np.einsum("mklr,lkrs->msl", z, f["L"]).reshape(3, n)
            expected = (np.fft.ifft if inverse else np.fft.fft)(x, norm=norm)
            np.testing.assert_allclose(y, expected, atol=1e-11 * n)


@pytest.mark.parametrize(
    ("n", "inverse"),
    mostly_long([(n, i) for n in (15, 36, 64, 48, 168, 7) for i in (False, True)], [(15, False), (48, True)]),
)
def test_starts_at_the_fft(n, inverse):
    module = MonarchTransform(n, inverse)
    x = example(n)
    params = held(module, x.astype(np.complex64))
    expected = (jnp.fft.ifft if inverse else jnp.fft.fft)(x)
    np.testing.assert_allclose(module.apply(params, x), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    real = module.apply(params, x.real.astype(np.float32))
    assert real.dtype == jnp.complex64
    k = max(k for k in range(1, n + 1) if n % k == 0 and k * k <= n)
    assert sum(a.size for a in jax.tree.leaves(params)) == n * (k + n // k)


def test_double_precision():
    with jax.enable_x64(True):
        module, x = MonarchTransform(48, norm="ortho", param_dtype=jnp.complex128), example(48)
        y = module.apply(held(module, x), x)
        assert y.dtype == jnp.complex128
        np.testing.assert_allclose(y, np.fft.fft(x, norm="ortho"), atol=1e-13)


@pytest.mark.parametrize(
    "structure",
    mostly_long(
        [
            "dense()",
            "monarch(blocks=4)",
            "monarch(blocks=2)",
            "block_low_rank(in_blocks=3, out_blocks=16, rank=1)",
            "block_low_rank(in_blocks=4, out_blocks=3, rank=4)",
        ],
        ["monarch(blocks=4)"],
    ),
)
def test_other_structures_that_hold_the_transform_start_there_too(structure):
    """monarch(blocks=b) does for every b whose square divides n: its slices then have rank n / b^2, as those of the DFT."""
    x = example(48).astype(np.complex64)
    module = MonarchTransform(48, structure=structure, norm="ortho")
    np.testing.assert_allclose(module.apply(held(module, x), x), np.fft.fft(x, norm="ortho"), atol=2e-5)


def test_site_and_accounting():
    table = sites(MonarchTransform(48), jax.ShapeDtypeStruct((5, 48), jnp.complex64))
    bound = table[""].bound
    assert table[""].kind == "linear" and bound.structure == BlockLowRank(in_blocks=6, out_blocks=8, rank=1)
    assert bound.is_complex and bound.params == 2 * 48 * (6 + 8)
    assert bound.dense_params == 2 * 48**2 and bound.cost(5).flops == 4 * 2 * 5 * 48 * (6 + 8)
    assert {leaf.dtype for leaf in bound.leaves().values()} == {jnp.dtype("complex64")}


def test_gradients_are_those_of_the_dense_path():
    with jax.enable_x64(True):
        x, target = example(15), example(16, 15)[:3, :15]
        factored = MonarchTransform(15, norm="ortho", param_dtype=jnp.complex128, path="factored")
        params = held(factored, x)

        def loss(path, params, x):
            y = factored.clone(path=path).apply(params, x)
            return jnp.sum(jnp.abs(y - target) ** 2) + jnp.sum(jnp.real(y) ** 3)

        slopes = lambda path: jax.jit(jax.grad(lambda p, x: loss(path, p, x), (0, 1)))(params, x)
        one, two = slopes("factored"), slopes("dense")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), one, two)
        # along a direction d the loss grows by Re(sum g d), jax's convention, by central differences
        d = jax.tree.map(lambda a: jnp.asarray(example(a.size, 1).reshape(a.shape)), params)
        moved = lambda t: loss("factored", jax.tree.map(lambda a, b: a + t * b, params, d), x)
        slope = sum(jnp.sum(g * e).real for g, e in zip(jax.tree.leaves(one[0]), jax.tree.leaves(d)))
        assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(float(slope), rel=1e-7)


def test_probe_is_added_to_the_matrix():
    x = example(15).astype(np.complex64)
    module = MonarchTransform(15)
    params = held(module, x)
    weight = example(15, 15).astype(np.complex64)
    w = bind_transform(15).materialize(params["params"])
    found = module.apply(params | {"probe": {"weight": weight}}, x)
    np.testing.assert_allclose(found, x @ (w + weight), atol=1e-4)


@pytest.mark.parametrize("structure", [None, "dense()", "block_low_rank(in_blocks=3, out_blocks=4, rank=2)"])
def test_the_matrix_is_the_transform_and_projects_back(structure):
    """Any two structures speak of one matrix, whatever digits they read, so one can become the other."""
    with jax.enable_x64(True):
        bound = bind_transform(12, structure=structure, param_dtype=jnp.complex128)
        params, x = bound.init(KEY), example(12)
        w = bound.materialize(params)
        if structure != "block_low_rank(in_blocks=3, out_blocks=4, rank=2)":
            np.testing.assert_allclose(w, np.fft.fft(np.eye(12)), atol=1e-12)
        np.testing.assert_allclose(bound.matmul(params, x), x @ w, atol=1e-12)
        np.testing.assert_allclose(bound.rmatmul(params, x), x @ w.T, atol=1e-12)
        np.testing.assert_allclose(bound.take(params, jnp.array([3, 0])), w[jnp.array([3, 0])])
        np.testing.assert_allclose(bound.materialize(bound.project(w)), w, atol=1e-12)
        other = bound.rebind(parse("monarch(blocks=2)"))
        assert other.d_in == 12 and other.is_complex and other.params == 2 * other.inner.params
        with pytest.raises(StructureError, match="no closed form with in_gram"):
            bound.project(w, in_gram=jnp.ones(12))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bind_transform(0), "at least 1, got 0"),
        (lambda: bind_transform(8, norm="unitary"), "norm must be one of backward, ortho, forward"),
        (lambda: bind_transform(8, param_dtype=jnp.float32), "complex64 or complex128, got float32"),
        (lambda: bind_transform(8, structure="monarch(blocks=3)"), "blocks=3 does not fit"),
        (lambda: MonarchTransform(8).init(KEY, jnp.ones((2, 9))), r"length 8: the input is of shape \(2, 9\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(StructureError, match=message):
        call()
