"""Transforms, Toeplitz and circulant matrices against scipy, numpy and exact integer phases."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat
from structmat import StructureError
from structmat.structures.fft import convolve, fast_length
from structmat.structures.transform import cosine, multiply_mod
from tests.marks import mostly_long

FIXED = [
    "fourier()",
    "fourier(inverse=True)",
    *(f"dct(kind={kind}, sine={sine})" for sine in (False, True) for kind in (1, 2, 3, 4)),
    "hadamard()",
]


def bind(text, n, m=None):
    return structmat.parse(text).bind(n, m or n)


def sized(*sizes):
    """Every fixed transform at every size it has."""
    lacks = lambda text, n: (text == "hadamard()" and n & (n - 1)) or (text == "dct(kind=1, sine=False)" and n < 2)
    every = [(t, n) for t in FIXED for n in sizes if not lacks(t, n)]
    return pytest.mark.parametrize(("text", "n"), mostly_long(every, every[:: 3 if len(every) > 30 else 1]))


def reference(text, x):
    """x @ W of a fixed transform by scipy or numpy."""
    structure = structmat.parse(text)
    if structure.name == "fourier":
        return (np.fft.ifft if structure.inverse else np.fft.fft)(x, norm="ortho")
    if structure.name == "dct":
        return (scipy.fft.dst if structure.sine else scipy.fft.dct)(x, type=structure.kind, norm="ortho")
    return x @ scipy.linalg.hadamard(x.shape[-1]) / math.sqrt(x.shape[-1])


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# -- fixed transforms --------------------------------------------------------------------------------------------------


@sized(1, 2, 3, 4, 9, 16, 22)
def test_fixed_transforms_are_those_of_scipy(text, n):
    """Products of real and complex inputs, transposed products, entries and rows, to 1e-13 in double precision."""
    bound, x, w = bind(text, n), normal(3, n), reference(text, np.eye(n))
    flipped, both, ids = bound.transpose(), x + 1j * x[::-1], np.array([[n - 1, 0]])

    @jax.jit
    def results(x, both):
        products = bound.matmul({}, x), bound.matmul({}, both), bound.rmatmul({}, x), flipped.matmul({}, x)
        return *products, bound.materialize({}), flipped.materialize({}), bound.take({}, ids)

    with jax.enable_x64(True):
        got = results(x, both)
    for actual, expected in zip(got, (x @ w, both @ w, x @ w.T, x @ w.T, w, w.T, w[ids]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(w @ w.conj().T, np.eye(n), atol=1e-13, err_msg="the reference itself is not unitary")


@pytest.mark.long
@sized(4096, 4095)
def test_long_products_in_single_precision(text, n):
    bound, x = bind(text, n), normal(2, n, dtype=np.float32)
    expected = reference(text, x.astype(np.float64))
    assert np.linalg.norm(bound.matmul({}, x) - expected) < 1e-6 * np.linalg.norm(expected)


@sized(4096, 65536)
def test_rows_of_long_transforms_are_accurate(text, n):
    """Rows from integer phases: 1e-7 of the size of the entries, at indices whose product passes 2^32."""
    ids = np.array([1, n // 3, n - 1], np.int32)
    unit = np.zeros((3, n))
    unit[np.arange(3), ids] = 1
    rows = jax.jit(functools.partial(bind(text, n).take, {}))(ids)
    assert rows.dtype == (jnp.complex64 if text.startswith("fourier") else jnp.float32)
    if text.startswith("hadamard"):
        ones = np.array([[bin(i & j).count("1") for j in range(n)] for i in ids])
        expected = (-1.0) ** ones / math.sqrt(n)
    else:
        expected = reference(text, unit)
    assert np.abs(rows - expected).max() < 2e-7 * math.sqrt(2 / n)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_products_modulo_do_not_overflow(data):
    m = data.draw(st.one_of(st.integers(1, 2**30 - 1), st.just(2**30 - 1)))
    a, b = (data.draw(st.one_of(st.integers(0, m - 1), st.just(m - 1))) for _ in "ab")
    assert int(multiply_mod(jnp.uint32(a), jnp.uint32(b), m)) == a * b % m


def test_cosine_is_exact_where_it_can_be():
    turns = np.arange(48, dtype=np.uint32)
    expected = np.cos(2 * np.pi * turns / 48)
    np.testing.assert_allclose(cosine(turns, 48), expected, rtol=0, atol=1e-7)
    assert cosine(jnp.uint32(24), 48) == -1 and cosine(jnp.uint32(0), 48) == 1


def test_transposes_stay_in_the_family():
    for text, other in [
        ("fourier()", "fourier()"),
        ("hadamard()", "hadamard()"),
        ("dct(kind=2, sine=True)", "dct(kind=3, sine=True)"),
        ("dct(kind=4)", "dct(kind=4)"),
    ]:
        assert structmat.parse(text).bind((2, 4), 8).transpose() == structmat.parse(other).bind(8, (2, 4))


@pytest.mark.parametrize(
    "text", ["fourier() @ fourier(inverse=True)", "dct() @ dct(kind=3)", "dct(kind=4) @ dct(kind=4)"]
)
def test_a_transform_times_its_inverse_is_the_identity(text):
    bound, x = bind(text, 12), normal(3, 12, dtype=np.float32)
    params = bound.init(jax.random.key(0))
    assert bound.params == 0
    np.testing.assert_allclose(jax.jit(bound.matmul)(params, x), x, atol=1e-6)


@pytest.mark.parametrize("text", ["dct()", "dct(kind=4)", "dct(kind=1, sine=True)", "toeplitz()", "circulant()"])
def test_low_precision_is_transformed_in_float32(text):
    bound, x = bind(text, 16), jnp.asarray(normal(3, 16), jnp.bfloat16)
    params = bound.init(jax.random.key(0), jnp.bfloat16)
    y = bound.matmul(params, x)
    wide = bound.matmul(jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    assert bind("fourier()", 16).matmul({}, x).dtype == jnp.complex64


@pytest.mark.parametrize("text", FIXED)
def test_gradients_are_transposed_products(text):
    bound, x, g, w = bind(text, 8), normal(3, 8), normal(3, 8, seed=1), reference(text, np.eye(8))
    back = jax.jit(lambda x, g: jax.vjp(lambda x: bound.matmul({}, x), x)[1](g)[0])
    with jax.enable_x64(True):
        got = back(*((v + 0j if bound.is_complex else v) for v in (x, g)))
    np.testing.assert_allclose(got, g @ w.T, atol=1e-13)


def test_projection_is_the_only_member():
    for text in FIXED:
        bound = bind(text, 8)
        assert bound.project(normal(8, 8), in_gram=np.ones(8), out_gram=np.eye(8)) == {} and bound.exact
        with pytest.raises(StructureError, match=r"expected \(8, 8\)"):
            bound.project(normal(8, 4))
        with pytest.raises(StructureError, match=r"out_gram must have shape \(8,\) or \(8, 8\), got \(4,\)"):
            bound.project(normal(8, 8), out_gram=np.ones(4))


@pytest.mark.parametrize(
    ("text", "n", "m", "message"),
    [
        ("hadamard()", 12, 12, "power of two, got 12; nearest: 8, 16"),
        ("hadamard()", 8, 16, r"hadamard: needs a square weight, got \(8, 16\)"),
        ("fourier()", 8, 16, r"fourier: needs a square weight, got \(8, 16\); put it .* fourier\(\) @ dense\(\)"),
        ("dct(kind=3)", 8, 16, r"as in dct\(kind=3\) @ dense\(\)"),
        ("dct(kind=5)", 8, 8, "dct: kind must be 1, 2, 3 or 4, got 5; nearest: 4"),
        ("dct(kind=1)", 1, 1, "kind=1 needs a size of at least 2, got 1"),
        ("circulant()", 8, 16, r"circulant: needs a square weight, got \(8, 16\)"),
        ("fit(fourier(), params=0.5)", 8, 8, "fourier"),
        ("fit(toeplitz(), params=0.5)", 8, 8, "toeplitz"),
    ],
)
def test_refusals(text, n, m, message):
    with pytest.raises(StructureError, match=message):
        structmat.parse(text).bind(n, m)


def test_transforms_cannot_be_scaled_by_init():
    with pytest.raises(StructureError, match=r"hadamard\(\) has no leaf that scales the matrix"):
        bind("hadamard()", 8).leaves(gain=0.5)
    assert set(bind("hadamard() @ diagonal()", 8).leaves(gain=0.5)["1"]) == {"d"}


def test_square_transforms_fix_the_inner_size():
    """Fastfood-like products need no `inner`."""
    bound = bind("diagonal() @ hadamard() @ diagonal() @ hadamard() @ dense()", 16, 24)
    assert bound.params == 16 + 16 + 16 * 24


# -- Toeplitz and circulant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (5, 1), (6, 9), (9, 6), (16, 16)])
def test_toeplitz_is_scipys(n, m):
    with jax.enable_x64(True):
        bound, t, x, y = bind("toeplitz()", n, m), normal(n + m - 1), normal(3, n, seed=1), normal(3, m, seed=2)
        w = scipy.linalg.toeplitz(t[n - 1 :: -1], t[n - 1 :])
        np.testing.assert_array_equal(bound.materialize({"t": t}), w)
        np.testing.assert_array_equal(bound.take({"t": t}, np.array([n - 1, 0])), w[[n - 1, 0]])
        products = lambda p, x, y: (bound.matmul(p, x), bound.rmatmul(p, y), bound.transpose().matmul(p, y))
        got = jax.jit(products)({"t": t}, x, y)
        for actual, expected in zip(got, (x @ w, y @ w.T, y @ w.T)):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)
        convolved = [np.convolve(row, t)[n - 1 : n - 1 + m] for row in x]
        np.testing.assert_allclose(got[0], convolved, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_circulant_is_scipys(n):
    with jax.enable_x64(True):
        bound, c, x = bind("circulant()", n), normal(n), normal(3, n, seed=1)
        w = scipy.linalg.circulant(c).T
        np.testing.assert_array_equal(bound.materialize({"c": c}), w)
        forward, back = jax.jit(lambda p, x: (bound.matmul(p, x), bound.rmatmul(p, x)))({"c": c}, x)
        np.testing.assert_allclose(forward, x @ w, rtol=0, atol=1e-13)
        np.testing.assert_allclose(back, x @ w.T, rtol=0, atol=1e-13)
        np.testing.assert_allclose(x @ w, [scipy.linalg.matmul_toeplitz((c, np.roll(c[::-1], 1)), r) for r in x])


def test_circulants_are_diagonal_in_the_fourier_basis():
    """The convolution theorem, between our own structures: W = F diag(sqrt(n) F c) F^-1."""
    n = 24
    with jax.enable_x64(True):
        c, x = normal(n), normal(3, n, seed=1)
        forward, back = bind("fourier()", n), bind("fourier(inverse=True)", n)
        spectrum = math.sqrt(n) * forward.matmul({}, c)
        expected = back.matmul({}, forward.matmul({}, x) * spectrum)
        np.testing.assert_allclose(bind("circulant()", n).matmul({"c": c}, x), expected, rtol=0, atol=1e-13)


def test_circulants_commute_and_multiply_within_the_family():
    bound = bind("circulant() @ circulant()", 12)
    a, b = {"c": normal(12, dtype=np.float32)}, {"c": normal(12, seed=1, dtype=np.float32)}
    matrix = jax.jit(bound.materialize)
    ab, ba = (np.asarray(matrix({"0": p, "1": q})) for p, q in ((a, b), (b, a)))
    np.testing.assert_allclose(ab, ba, atol=1e-5)
    inside = bind("circulant()", 12)
    np.testing.assert_allclose(inside.materialize(inside.project(ab)), ab, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "n", "m"), [("toeplitz()", 4096, 4096), ("toeplitz()", 3000, 1097), ("circulant()", 4099, 4099)]
)
def test_long_convolutions_in_single_precision(text, n, m):
    bound, x = bind(text, n, m), normal(2, n, dtype=np.float32)
    (name,) = bound.leaves()
    params = {name: normal(*bound.leaves()[name].shape, seed=1, dtype=np.float32)}
    kernel = params[name].astype(np.float64)
    if name == "t":
        expected = scipy.linalg.matmul_toeplitz((kernel[n - 1 :], kernel[n - 1 :: -1]), x.T.astype(np.float64)).T
    else:
        expected = np.fft.ifft(np.fft.fft(x.astype(np.float64)) * np.fft.fft(kernel)).real
    assert np.linalg.norm(bound.matmul(params, x) - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("text", ["toeplitz()", "circulant()"])
def test_complex_kernels_and_inputs(text):
    bound = bind(text, 9)
    (name,) = bound.leaves()
    shape = bound.leaves()[name].shape
    kernel = (normal(*shape) + 1j * normal(*shape, seed=1)).astype(np.complex64)
    x = (normal(3, 9, seed=2) + 1j * normal(3, 9, seed=3)).astype(np.complex64)
    results = jax.jit(
        lambda p, v: (w := bound.materialize(p), bound.matmul(p, v), bound.rmatmul(p, v), bound.project(w))
    )
    for p, v in ((kernel, x), (kernel.real, x), (kernel, x.real)):
        w, y, back, found = results({name: p}, v)
        assert y.dtype == back.dtype == jnp.complex64
        np.testing.assert_allclose(y, v @ np.asarray(w), atol=1e-5)
        np.testing.assert_allclose(back, v @ np.asarray(w).T, atol=1e-5)
        np.testing.assert_allclose(found[name], p, atol=1e-6)


@pytest.mark.parametrize(("text", "n", "m"), [("toeplitz()", 5, 8), ("toeplitz()", 8, 5), ("circulant()", 6, 6)])
@pytest.mark.parametrize("sides", [(), ("in_gram",), ("out_gram",), ("in_gram", "out_gram")], ids="+".join)
def test_projection_is_least_squares(text, n, m, sides):
    """numpy solves the weighted least squares over the matrices of the unit parameters."""
    with jax.enable_x64(True):
        bound, w = bind(text, n, m), normal(n, m)
        (name,) = bound.leaves()
        size = bound.leaves()[name].shape[0]
        grams = {"in_gram": np.random.default_rng(1).uniform(0.1, 3, n), "out_gram": np.arange(1.0, m + 1)}
        grams = {k: grams[k] for k in sides}
        root = np.sqrt(np.outer(grams.get("in_gram", np.ones(n)), grams.get("out_gram", np.ones(m)))).ravel()
        basis = np.stack([np.asarray(bound.materialize({name: e})).ravel() for e in np.eye(size)], 1)
        expected = np.linalg.lstsq(root[:, None] * basis, root * w.ravel(), rcond=None)[0]
        found = jax.jit(bound.project)(w, **grams)[name]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(bound.project(w, **grams)[name], expected, rtol=0, atol=1e-12)


def test_diagonals_without_weight_become_zero():
    w, gram = normal(3, 4, dtype=np.float32), np.array([1.0, 0, 0], np.float32)
    t = bind("toeplitz()", 3, 4).project(w, in_gram=gram)["t"]
    np.testing.assert_array_equal(t, [0, 0, *w[0]])
    c = bind("circulant()", 3).project(w[:, :3], in_gram=gram, out_gram=np.array([0.0, 1, 1], np.float32))["c"]
    np.testing.assert_array_equal(c, [0, w[0, 1], w[0, 2]])


@pytest.mark.parametrize("text", ["toeplitz()", "circulant()"])
def test_full_grams_and_bad_ones_are_refused(text):
    bound = bind(text, 6)
    with pytest.raises(StructureError, match="a full in_gram couples the blocks and has no closed form"):
        bound.project(normal(6, 6, dtype=np.float32), in_gram=jnp.eye(6))
    with pytest.raises(StructureError, match="out_gram must not have negative entries; smallest is -1"):
        bound.project(normal(6, 6, dtype=np.float32), out_gram=-jnp.ones(6))
    with pytest.raises(StructureError, match=r"cannot project an array of shape \(5, 6\)"):
        bound.project(normal(5, 6, dtype=np.float32))


@pytest.mark.parametrize("text", ["toeplitz()", "circulant()"])
def test_large_members_are_recovered(text):
    """Means over diagonals of 2048 entries do not lose digits, and stacks are projected by vmap."""
    bound = bind(text, 2048)
    params = bound.init(jax.random.key(0))
    w = bound.materialize(params)
    (found,) = jax.jit(jax.vmap(bound.project))(jnp.stack([w, -3 * w])).values()
    (expected,) = params.values()
    for row, scale in zip(found, (1, -3)):
        assert np.linalg.norm(row - scale * expected) < 1e-6 * np.linalg.norm(scale * expected)


def test_lengths_of_ffts_are_fast():
    for least in (1, 2, 7, 11, 97, 1025, 3839, 8191):
        assert fast_length(least) == scipy.fft.next_fast_len(least, real=True)
    x, k = normal(2, 5, dtype=np.float32), normal(4, seed=1, dtype=np.float32)
    for length in (8, 9, 12):
        full = np.stack([np.convolve(row, k) for row in x])
        np.testing.assert_allclose(convolve(x, k, length)[:, :8], full, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "n", "m", "params", "flops"),
    [
        ("toeplitz()", 512, 512, 1023, lambda r: (2 * r + 1) * 5 * 1024 * 10 // 2 + r * 513),
        ("circulant()", 1024, 1024, 1024, lambda r: (2 * r + 1) * 5 * 1024 * 10 // 2 + r * 513),
        ("circulant()", 509, 509, 509, lambda r: (2 * r + 1) * 5 * 1024 * 10 // 2 + r * 513),
        ("fourier()", 1024, 1024, 0, lambda r: r * 5 * 1024 * 10),
        ("dct()", 1024, 1024, 0, lambda r: r * (5 * 1024 * 10 // 2 + 513)),
        ("dct(kind=4)", 1024, 1024, 0, lambda r: r * (5 * 512 * 9 + 1024)),
        ("hadamard()", 1024, 1024, 0, lambda r: r * 2 * 1024 * (32 + 32)),
        ("hadamard()", 65536, 65536, 0, lambda r: r * 2 * 65536 * (64 + 32 + 32)),
    ],
)
def test_costs(text, n, m, params, flops):
    cost = bind(text, n, m).cost(7)
    assert (cost.params, cost.flops, cost.bits) == (params, flops(7), 32 * params)


def test_block_circulant_is_a_grid_of_scipy_circulants():
    bound, rng = structmat.parse("block_circulant(block=4)").bind(8, 12), np.random.default_rng(0)
    c = rng.normal(size=(2, 3, 4)).astype(np.float32)
    expected = np.block([[scipy.linalg.circulant(c[k, l]).T for l in range(3)] for k in range(2)])
    np.testing.assert_allclose(bound.materialize({"c": jnp.asarray(c)}), expected)
    w = rng.normal(size=(8, 12)).astype(np.float32)
    mean = lambda block: [np.mean([block[i, (i + d) % 4] for i in range(4)]) for d in range(4)]
    blocks = [[mean(w[4 * k : 4 * k + 4, 4 * l : 4 * l + 4]) for l in range(3)] for k in range(2)]
    np.testing.assert_allclose(bound.project(jnp.asarray(w))["c"], blocks, atol=1e-6)
    whole = structmat.project(w[:, :8], "block_circulant(block=8)").materialize()
    np.testing.assert_allclose(whole, structmat.project(w[:, :8], "circulant()").materialize(), atol=1e-6)
