"""Butterflies against stages written out as matrices, their projection, and the exact fast transforms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg

import structmat
from structmat import StructureError
from structmat.structures import butterfly_transforms as transforms
from structmat.structures.butterfly_projection import peel
from structmat.structures.butterfly_stages import MERGE_ROWS
from tests.marks import mostly_long, thinned
from tests.structures.flops import count_flops

SHAPES = [
    ("butterfly()", 2),
    ("butterfly(increasing=False)", 32),
    ("butterfly(depth=2, field='complex')", 64),
    ("butterfly(increasing=False, depth=3)", 16),
]
every_shape = pytest.mark.parametrize(("text", "n"), SHAPES, ids=lambda v: str(v))


def drawn(text, n, seed=0):
    """(Bound, parameters with normal entries)."""
    bound, rng = structmat.parse(text).bind(n, n), np.random.default_rng(seed)
    normal = lambda leaf: rng.normal(size=leaf.shape) + (1j * rng.normal(size=leaf.shape) if leaf.dtype else 0)
    params = {k: (normal(v) / 2).astype(v.dtype or np.float32) for k, v in bound.leaves().items()}
    return bound, jax.tree.map(jnp.asarray, params)


def written_out(bound, params):
    """The matrix as a product of n x n stages, filled entry by entry from the definition."""
    n, s = bound.d_in, bound.d_in.bit_length() - 1
    w = np.eye(n)
    for k, t in enumerate(np.asarray(params[f"stage{i}"]) for i in range(s * bound.structure.depth)):
        up = bound.structure.increasing ^ (k // s % 2 == 1)
        stride = 2 ** (k % s if up else s - 1 - k % s)
        stage = np.zeros((n, n), t.dtype)
        for i in range(n):
            bit, low, pair = i // stride % 2, i % stride, i // (2 * stride) * stride + i % stride
            for out in (0, 1):
                stage[i, i // (2 * stride) * 2 * stride + out * stride + low] = t[bit, out, pair]
        w = w @ stage
    return w


def close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@every_shape
@pytest.mark.parametrize("rows", [MERGE_ROWS - 1, MERGE_ROWS])
def test_product_is_that_of_the_stages(text, n, rows):
    """Single stages and merged ones, both ways, and rows of the matrix."""
    bound, params = drawn(text, n)
    w = written_out(bound, params)
    x = np.random.default_rng(1).normal(size=(rows, n)).astype(np.float32)
    ids = np.arange(n, dtype=np.int32)[::-1].reshape(2, -1)
    results = jax.jit(lambda p, x: (bound.matmul(p, x), bound.rmatmul(p, x), bound.materialize(p), bound.take(p, ids)))
    for actual, expected in zip(results(params, x), (x @ w, x @ w.T, w, w[ids])):
        close(actual, expected)


@pytest.mark.parametrize("text", ["butterfly()", "butterfly(increasing=False, depth=2, field='complex')"])
def test_flops_of_either_way(text):
    bound, params = drawn(text, 128)
    for rows in (1, MERGE_ROWS - 1, MERGE_ROWS, 50):
        x = jnp.ones((rows, 128))
        assert bound.cost(rows).flops == count_flops(bound.matmul, params, x)
    depth = bound.structure.depth
    assert bound.cost(1).flops == 2 * 128 * 7 * depth
    assert bound.params == 2 * 128 * 7 * depth * (2 if bound.is_complex else 1)


@pytest.mark.long
@pytest.mark.parametrize("increasing", [True, False])
def test_gradient_of_merged_stages_at_full_size(increasing):
    """At the size where a seven-dimensional multiply-and-reduce crashes XLA on CPU."""
    bound, params = drawn(f"butterfly(increasing={increasing})", 1024)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(MERGE_ROWS, 1024)), jnp.float32)
    square = lambda params, x: jnp.sum(bound.matmul(params, x) ** 2)
    merged = jax.jit(jax.grad(square))(params, x)
    halves = [jax.jit(jax.grad(square))(params, part) for part in (x[: MERGE_ROWS // 2], x[MERGE_ROWS // 2 :])]
    jax.tree.map(functools.partial(close, tolerance=1e-5), merged, jax.tree.map(jnp.add, *halves))


# -- initialisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", thinned(["complex", "real"], 2))
def test_paper_init_is_orthogonal(field):
    bound = structmat.parse(f"butterfly(depth=2, field='{field}', init='paper')").bind(64, 64)
    params = jax.jit(bound.init)(jax.random.key(0))
    w = np.asarray(jax.jit(bound.materialize)(params))
    np.testing.assert_allclose(w @ w.conj().T, np.eye(64), atol=2e-6)
    blocks = np.concatenate([np.moveaxis(np.asarray(t), -1, 0) for t in params.values()])
    entries, determinants = blocks.reshape(-1, 4), np.linalg.det(blocks)
    assert np.abs(entries.mean(0)).max() < 5 * 0.5**0.5 * len(blocks) ** -0.5
    np.testing.assert_allclose((np.abs(entries) ** 2).mean(0), 0.5, atol=5 * 0.35 * len(blocks) ** -0.5)
    assert abs(determinants.mean()) < 5 * len(blocks) ** -0.5, "reflections are as frequent as rotations"


def test_paper_init_follows_a_gain():
    bound = structmat.parse("butterfly(init='paper')").bind(16, 16)
    w = [np.asarray(bound.materialize(bound.init(jax.random.key(0), gain=g))) for g in (1.0, 3.0, 0.0)]
    close(w[1], 3 * w[0])
    assert not np.any(w[2])


# -- projection ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("n", "increasing", "field"), [(8, True, "complex"), (64, False, "real"), (32, True, "real")])
def test_members_are_recovered_exactly(n, increasing, field):
    """Without a start to lean on, to the precision of the dtype."""
    text = f"butterfly(increasing={increasing}, field='{field}')"
    bound, params = drawn(text, n)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(np.asarray(v), jnp.promote_types(v.dtype, jnp.float64)) for k, v in params.items()}
        member = bound.materialize(wide)
        found = jax.jit(bound.project)(member)
        assert {v.dtype for v in found.values()} == {v.dtype for v in wide.values()}
        close(bound.materialize(found), member, 1e-12)
        norms = [float(jnp.linalg.norm(v)) for v in found.values()]
        np.testing.assert_allclose(norms, norms[0], rtol=1e-10)


def test_sparse_members_are_recovered():
    """Blocks of the matrix that are zero: identity, a reversal, one entry, nothing."""
    bound = structmat.parse("butterfly()").bind(16, 16)
    one = np.zeros((16, 16), np.float32)
    one[3, 9] = -2
    project = jax.jit(lambda w: bound.materialize(bound.project(w)))
    for member in (np.eye(16, dtype=np.float32), np.eye(16, dtype=np.float32)[::-1], one, 0 * one):
        np.testing.assert_allclose(project(member), member, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("n", [8, 64])
def test_transforms_are_found(n):
    """The Fourier matrix with its rows in bit-reversed order is one complex pass, the Hadamard matrix one real pass."""
    order = np.asarray(transforms.dft(n).params["0"]["index"])
    fourier = np.fft.fft(np.eye(n))[order].astype(np.complex64)
    found = structmat.project(fourier, "butterfly(field='complex')")
    assert float(found.error(fourier)) < 2e-6
    hadamard = scipy.linalg.hadamard(n).astype(np.float32)
    assert float(structmat.project(hadamard, "butterfly(increasing=False)").error(hadamard)) < 2e-6


def block_tails(w, increasing):
    """For every split into first and later stages the squares w's blocks have beyond their first singular value."""
    w, n = (w if increasing else w.T), len(w)
    tails = []
    for low in (2**k for k in range(1, n.bit_length() - 1)):
        blocks = w.reshape(n // low, low, n // low, low).transpose(0, 3, 1, 2)
        tails.append((np.linalg.svd(blocks, compute_uv=False)[..., 1:] ** 2).sum())
    return tails


def halving(w):
    """Reference: the published hierarchical algorithm, halving the stages, the root of sigma on either side."""
    n = len(w)
    if n == 2:
        return w
    low = 2 ** ((n.bit_length() - 1) // 2)
    high = n // low
    u, s, vt = np.linalg.svd(w.reshape(high, low, high, low).transpose(0, 3, 1, 2), full_matrices=False)
    left = (u[..., 0] * np.sqrt(s[..., :1])).swapaxes(1, 2)  # (h, in low, out low)
    right = (vt[..., 0, :] * np.sqrt(s[..., :1])).swapaxes(0, 1)  # (out low, in high, out high)
    left, right = np.stack([halving(b) for b in left]), np.stack([halving(b) for b in right])
    return np.einsum("hlk,khg->hlgk", left, right).reshape(n, n)


@pytest.mark.long
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("kind", ["normal", "ar", "hilbert", "noisy member"])
def test_error_against_bounds_and_the_published_algorithm(kind, increasing):
    """No less than the largest tail of one split; peeling no more than their sum; refined no more than the reference."""
    rng, i = np.random.default_rng(0), np.arange(32)
    bound, params = drawn(f"butterfly(increasing={increasing})", 32)
    member = np.asarray(bound.materialize(params))
    noise = rng.normal(size=(32, 32)).astype(np.float32)
    w = {
        "normal": noise,
        "ar": 0.9 ** np.abs(i[:, None] - i),
        "hilbert": 1 / (1 + i[:, None] + i),
        "noisy member": member + 0.3 * np.linalg.norm(member) / 32 * noise,
    }[kind].astype(np.float32)
    square = lambda m: float(np.linalg.norm(w - np.asarray(m)) ** 2)
    tails = block_tails(w, increasing)
    stages = jax.jit(peel, static_argnums=1)(w, increasing)
    peeled = bound.materialize({f"stage{k}": t for k, t in enumerate(stages)})
    refined = square(structmat.project(w, bound.structure).materialize())
    assert max(tails) <= refined * (1 + 1e-5) <= square(peeled) * (1 + 2e-5) <= sum(tails) * (1 + 3e-5)
    reference = halving(w) if increasing else halving(w.T).T
    assert refined < square(reference) * (0.995 if kind == "normal" else 1)


@pytest.mark.parametrize("text", ["butterfly()", "butterfly(increasing=False, field='complex')"])
def test_no_stage_can_be_improved_alone(text):
    """The gradient of the error vanishes beside its size where stages are scaled; peeling alone leaves ten times more."""
    bound, i = structmat.parse(text).bind(16, 16), np.arange(16)
    turn = np.exp(0.3j * i[:, None] ** 2 + 0.2j * i) if bound.is_complex else 1
    w = jnp.asarray(0.9 ** np.abs(i[:, None] - i) * turn, jnp.complex64 if bound.is_complex else jnp.float32)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.abs(w - bound.materialize(p)) ** 2)))
    largest = lambda p: max(float(jnp.linalg.norm(s) / jnp.linalg.norm(p[k])) for k, s in slope(p).items())
    peeled = {f"stage{k}": t for k, t in enumerate(jax.jit(peel, static_argnums=1)(w, bound.structure.increasing))}
    refined = largest(jax.jit(bound.project)(w))
    assert refined < 1e-3 and refined < 0.1 * largest(peeled)


@pytest.mark.long
def test_more_passes_come_nearer():
    i = np.arange(16)
    w = jnp.asarray(1 / (1 + i[:, None] + i), jnp.float32)
    errors = [float(structmat.project(w, f"butterfly(depth={d})").error(w)) for d in (1, 2, 3)]
    assert errors[1] < 0.2 * errors[0] and errors[2] < errors[1]


@pytest.mark.long
def test_phases_of_rows_and_columns_do_not_matter():
    """They are absorbed by the outer stages, so a complex matrix of turned real entries is met as the real one."""
    i = np.arange(16)
    w = (1 / (1 + i[:, None] + i)).astype(np.complex64)
    turned = w * np.exp(0.3j * i[:, None] ** 2 + 0.2j * i).astype(np.complex64)
    plain, other = (float(structmat.project(m, "butterfly(depth=2, field='complex')").error(m)) for m in (w, turned))
    assert other == pytest.approx(plain, rel=0.01) and plain < 0.02


@pytest.mark.long
def test_a_good_start_is_refined():
    """From the neighbourhood of a member of two passes the member is found, which a cold start does not reach."""
    bound, params = drawn("butterfly(depth=2)", 16)
    member = bound.materialize(params)
    near = jax.tree.map(lambda t: t + 0.02 * np.random.default_rng(1).normal(size=t.shape).astype(np.float32), params)
    error = lambda p: float(jnp.linalg.norm(member - bound.materialize(p)) / jnp.linalg.norm(member))
    project = jax.jit(bound.project)
    warm = error(project(member, like=near))
    assert warm < 0.1 * error(near) and warm < 0.1 * error(project(member, like=None))


@pytest.mark.parametrize(
    "text", mostly_long(["butterfly()", "butterfly(increasing=False, depth=2, field='complex')"], ["butterfly()"])
)
def test_diagonal_grams_are_absorbed(text):
    """The weighted problem is the plain one for D w E, and is solved as well."""
    rng = np.random.default_rng(4)
    bound, w = structmat.parse(text).bind(8, 8), rng.normal(size=(8, 8)).astype(np.float32)
    a, b = rng.uniform(0.1, 3, (2, 8)).astype(np.float32)
    scaled = np.sqrt(a)[:, None] * w * np.sqrt(b)
    nearest = jax.jit(lambda w, **grams: bound.materialize(bound.project(w, **grams)))
    expected = np.linalg.norm(scaled - nearest(scaled))
    found = nearest(w, in_gram=a, out_gram=b)
    weighted = np.linalg.norm(np.sqrt(a)[:, None] * (w - found) * np.sqrt(b))
    assert weighted == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_projection_of_a_stack():
    w = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    bound = structmat.parse("butterfly(depth=2)").bind(8, 8)
    stacked, alone = jax.jit(jax.vmap(bound.project))(w), jax.jit(bound.project)
    for i in range(3):
        each = alone(w[i])
        error = lambda p, i=i: float(jnp.linalg.norm(w[i] - bound.materialize(p)))
        assert error(jax.tree.map(lambda t, i=i: t[i], stacked)) == pytest.approx(error(each), rel=1e-3)


# -- sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit():
    with pytest.raises(StructureError, match=r"needs a square weight, got \(8, 16\)"):
        structmat.parse("butterfly()").bind(8, 16)
    with pytest.raises(StructureError, match="d_in=24 is not a power of two; nearest sizes that work: 16, 32"):
        structmat.parse("butterfly()").bind(24, 24)
    with pytest.raises(StructureError, match="d_in=1 is not a power of two; nearest sizes that work: 2, 4"):
        structmat.parse("butterfly()").bind(1, 1)
    with pytest.raises(StructureError, match="depth must be at least 1, got 0"):
        structmat.parse("butterfly(depth=0)")


def test_fit_chooses_the_depth():
    bound = structmat.parse("fit(butterfly(), params=0.25)").bind(256, 256)
    assert bound.structure.depth == 256 // (4 * 2 * 8) and bound.params <= 0.25 * 256**2
    assert structmat.parse("butterfly()").bind(256, 256).structure.depth == 1


# -- exact transforms ----------------------------------------------------------------------------------------------------


def exact(name, n, rng):
    """(Matrix, the dense matrix as numpy or scipy computes it) with the arrays of this mode's precision."""
    c, r = rng.normal(size=(2, n))
    dtype = jnp.complex128 if jax.config.jax_enable_x64 else jnp.complex64
    eye = np.eye(n)
    return {
        "dft": lambda: (transforms.dft(n, dtype), np.fft.fft(eye)),
        "inverse_dft": lambda: (transforms.inverse_dft(n, dtype), np.fft.ifft(eye)),
        "hadamard": lambda: (transforms.hadamard(n, jnp.finfo(dtype).dtype), scipy.linalg.hadamard(n)),
        "dct": lambda: (transforms.dct(n, dtype), scipy.fft.dct(eye)),
        "dst": lambda: (transforms.dst(n, dtype), scipy.fft.dst(eye)),
        "circulant": lambda: (transforms.circulant(c), scipy.linalg.circulant(c)),
        "toeplitz": lambda: (transforms.toeplitz(c, r), scipy.linalg.toeplitz(c, r)),
    }[name]()


NAMES = ["dft", "inverse_dft", "hadamard", "dct", "dst", "circulant", "toeplitz"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", mostly_long([8, 16, 64, 256], [16]))
def test_exact_transforms(name, n):
    rng = np.random.default_rng(n)
    w, expected = exact(name, n, rng)
    assert structmat.parse(str(w.structure)).bind(*w.shape) == w.bound
    x = rng.normal(size=(MERGE_ROWS, n)).astype(np.float32)
    product, whole = jax.jit(lambda w, x: (x @ w, w.materialize()))(w, x)
    close(product, x @ expected)
    close(whole, expected)


@pytest.mark.parametrize("name", NAMES)
def test_exact_transforms_in_double_precision(name):
    with jax.enable_x64(True):
        w, expected = exact(name, 64, np.random.default_rng(0))
        close(jax.jit(structmat.Matrix.materialize)(w), expected, 2e-15 * 64)


def test_transforms_invert_and_transpose():
    np.testing.assert_allclose(transforms.dft(16).materialize() @ transforms.inverse_dft(16), np.eye(16), atol=1e-6)
    close(transforms.dct(16).T.materialize(), scipy.fft.dct(np.eye(16)).T)
    close(
        np.eye(16, dtype=np.float32) @ transforms.circulant(np.arange(16.0)).T, scipy.linalg.circulant(np.arange(16)).T
    )


@pytest.mark.long
@pytest.mark.parametrize(("c", "r"), [(5, 3), (3, 7), (1, 4), (6, 1), (1, 1)])
def test_toeplitz_of_any_shape(c, r):
    rng = np.random.default_rng(0)
    c, r = rng.normal(size=c) + 1j * rng.normal(size=c), rng.normal(size=r)
    np.testing.assert_allclose(transforms.toeplitz(c, r).materialize(), scipy.linalg.toeplitz(c, r), atol=1e-6)
    np.testing.assert_allclose(transforms.toeplitz(c).materialize(), scipy.linalg.toeplitz(c), atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["dct", "toeplitz"])
def test_transforms_train_from_there(name):
    """Every trainable leaf of the product gets a gradient, and a step along it approaches another target."""
    w, expected = exact(name, 8, np.random.default_rng(0))
    target = expected + 0.1 * np.random.default_rng(1).normal(size=expected.shape)
    flat, tree = jax.tree.flatten(w.params)
    at = [i for i, p in enumerate(flat) if jnp.issubdtype(p.dtype, jnp.complexfloating)]

    def loss(values):
        full = list(flat)
        for i, v in zip(at, values):
            full[i] = v
        moved = dataclasses.replace(w, params=jax.tree.unflatten(tree, full))
        return jnp.sum(jnp.abs(moved.materialize() - target) ** 2)

    start = [flat[i] for i in at]
    slopes = jax.jit(jax.grad(loss))(start)
    assert all(float(jnp.linalg.norm(s)) > 0 for s in slopes)
    assert float(loss([v - 1e-4 * s.conj() for v, s in zip(start, slopes)])) < float(loss(start))


def test_transforms_refuse():
    with pytest.raises(StructureError, match="d_in=12 is not a power of two; nearest sizes that work: 8, 16"):
        transforms.dct(12)
    with pytest.raises(StructureError, match=r"c must be a vector with at least one entry, got shape \(2, 2\)"):
        transforms.circulant(np.ones((2, 2)))
