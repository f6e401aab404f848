"""Householder frames, permutations and the identity: what makes them orthogonal, and their closed-form projections."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import structmat
from structmat import StructureError
from structmat.structures.householder import frame, frame_flops, reflections_of
from tests.marks import mostly_long
from tests.structures.flops import count_flops

SIZES = [(1, 1), (5, 1), (7, 3), (12, 12), (33, 8), (100, 37)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_after_the_other(y):
    """H_1 ... H_k applied one reflection at a time, in double precision: the full (d, d) matrix."""
    q = np.eye(len(y))
    for v in np.asarray(y, np.float64).T:
        q = q - 2 * np.outer(q @ v, v) / (v @ v)
    return q


def orthonormal(d, k, seed=0):
    return np.linalg.qr(normal(d, k, seed=seed))[0]


# -- frames --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "k"), SIZES)
def test_compact_form_is_the_sequential_product(d, k):
    """For any number of reflections and any size, whatever the length of the vectors."""
    y = normal(d, k) * 10.0 ** np.linspace(-12, 12, k, dtype=np.float32)
    p = np.asarray(jax.jit(frame)(y))
    np.testing.assert_allclose(p, one_after_the_other(y)[:, :k], atol=3e-6)
    np.testing.assert_allclose(p.T @ p, np.eye(k), atol=5e-6)


@pytest.mark.long
@pytest.mark.parametrize(("d", "k"), SIZES)
def test_vectors_of_any_orthonormal_columns(d, k):
    """QR by Householder reflections gives back the columns: also for the identity, whose reflections LAPACK leaves out."""
    swapped = np.eye(d, k, dtype=np.float32)[::-1].copy()
    for q in (orthonormal(d, k), np.eye(d, k, dtype=np.float32), -np.eye(d, k, dtype=np.float32), swapped):
        y, signs = jax.jit(reflections_of)(q)
        np.testing.assert_allclose(frame(y) * signs, q, atol=5e-6)
        assert set(np.asarray(signs)) <= {-1, 1} and np.all(np.linalg.norm(y, axis=0) >= 1), "no dead reflection"


def test_gradient_of_a_reflection_is_orthogonal_to_it():
    """In double precision, against central differences; and the length of a vector divides its gradient."""
    with jax.enable_x64(True):
        y, probe = jnp.asarray(normal(9, 4), jnp.float64), jnp.asarray(normal(9, 4, seed=1), jnp.float64)
        f = jax.jit(lambda y: jnp.sum(probe * jnp.sin(3 * frame(y))))
        slope = jax.grad(f)(y)
        np.testing.assert_allclose(jnp.sum(slope * y, axis=0), 0, atol=1e-13)
        along = jnp.asarray(normal(9, 4, seed=2), jnp.float64)
        difference = (f(y + 1e-6 * along) - f(y - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose(jnp.vdot(slope, along), difference, rtol=1e-7)
        np.testing.assert_allclose(jax.grad(f)(1e-200 * y) * 1e-200, slope, rtol=1e-10)


@pytest.mark.long
def test_zero_vectors_reflect_nothing():
    y = normal(6, 3)
    y[:, 1] = 0
    np.testing.assert_allclose(frame(y), one_after_the_other(y[:, [0, 2]])[:, :3], atol=1e-6)
    for start in (y, 0 * y, 1e-38 * y):
        slope = jax.grad(lambda y: jnp.sum(jnp.sin(frame(y)) ** 2))(jnp.asarray(start))
        assert np.all(np.isfinite(slope)) and not np.any(slope[:, 1])


def test_narrow_parameters_are_built_in_single_precision():
    y = jnp.asarray(normal(64, 16), jnp.bfloat16)
    assert frame(y).dtype == jnp.bfloat16
    np.testing.assert_array_equal(frame(y), frame(y.astype(jnp.float32)).astype(jnp.bfloat16))


# -- the matrix ----------------------------------------------------------------------------------------------------------


def singular_values(bound, params):
    return np.linalg.svd(np.asarray(bound.materialize(params), np.float64), compute_uv=False)


@pytest.mark.long
@pytest.mark.parametrize(("n", "m", "k"), [(10, 6, 3), (6, 10, 6), (9, 9, 9)])
def test_singular_values_stay_ones_under_training(n, m, k):
    """Exactly k ones and zeros otherwise, at init and after steps of SGD that change the matrix much."""
    bound = structmat.parse(f"householder(reflections={k})").bind(n, m)
    start = params = bound.init(jax.random.key(0))
    x, target = normal(30, n), normal(30, m, seed=1)
    loss = lambda p: jnp.mean((bound.matmul(p, x) - target) ** 2)
    move = lambda p, g: p if g.dtype == jax.dtypes.float0 else p - 0.3 * g
    step = jax.jit(lambda p: jax.tree.map(move, p, jax.grad(loss, allow_int=True)(p)))
    ones = np.r_[np.ones(k), np.zeros(min(n, m) - k)]
    np.testing.assert_allclose(singular_values(bound, params), ones, atol=2e-6)
    for _ in range(10):
        params = step(params)
    np.testing.assert_allclose(singular_values(bound, params), ones, atol=2e-6)
    assert loss(params) < loss(start)
    assert np.abs(bound.materialize(params) - bound.materialize(start)).max() > 0.1


@pytest.mark.long
def test_no_vector_grows():
    """|x W| <= |x| everywhere, with equality on the column space of u's frame."""
    bound = structmat.parse("householder(reflections=4)").bind(12, 7)
    params = bound.init(jax.random.key(1))
    x = normal(50, 12)
    size = lambda v: np.linalg.norm(v, axis=-1)
    assert np.all(size(bound.matmul(params, x)) < size(x))
    inside = x @ frame(params["u"]) @ frame(params["u"]).T
    np.testing.assert_allclose(size(bound.matmul(params, inside)), size(inside), rtol=1e-5)


@pytest.mark.parametrize("mode", ["spectral", "variance", "paper"])
def test_matrix_at_init(mode):
    """E[y^2] = k / d_out always; uniform but for `paper`: no entry and no sign is preferred."""
    bound = structmat.parse(f"householder(reflections=5, init='{mode}')").bind(16, 20)
    draw = jax.jit(jax.vmap(lambda key: (p := bound.init(key), bound.materialize(p))))
    params, w = draw(jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose((w**2).sum((1, 2)) / 20, 5 / 20, rtol=1e-4)
    if mode == "paper":
        assert np.std(params["u"]) == pytest.approx(0.05, rel=0.01)
        return
    np.testing.assert_allclose(np.mean(w**2, axis=0), 5 / 320, atol=5 * 1.6 * 5 / 320 / 20)
    np.testing.assert_allclose(np.mean(w, axis=0), 0, atol=5 * (5 / 320) ** 0.5 / 20)


def test_declaration():
    bound = structmat.parse("householder(reflections=4)").bind(12, 20)
    leaves = bound.leaves("embed", "mlp")
    assert bound.params == 4 * (12 + 20)
    assert not leaves["u"].decay and not leaves["v"].decay and not leaves["signs"].trainable
    assert (leaves["u"].axes, leaves["v"].axes) == (("embed", "rank"), ("mlp", "rank"))
    with pytest.raises(StructureError, match="no leaf that scales the matrix"):
        bound.init(jax.random.key(0), gain=0.5)
    with pytest.raises(StructureError, match=r"reflections=13 does not fit .* nearest valid: 7, 8, 9, 10, 11, 12"):
        structmat.parse("householder(reflections=13)").bind(12, 20)
    assert structmat.parse("fit(householder(), params=0.5)").bind(12, 20).structure.reflections == 3


@pytest.mark.long
def test_flops():
    """All GEMMs are traced; the triangular solves, which are not, take k^3 a side."""
    bound = structmat.parse("householder(reflections=4)").bind(12, 20)
    params, x, y = bound.init(jax.random.key(0)), jnp.ones((5, 12)), jnp.ones((5, 20))
    assert bound.cost(5).flops == count_flops(bound.matmul, params, x) + 2 * 4**3
    assert bound.cost(5).flops == count_flops(bound.rmatmul, params, y) + 2 * 4**3
    through_dense = bound.cost(5, path="dense").flops_executed
    assert through_dense == count_flops(lambda p, x: x @ bound.materialize(p), params, x) + 2 * 4**3
    assert bound.cost(5).flops - bound.cost(4).flops == 2 * 4 * (12 + 20) + 4
    assert frame_flops(12, 4) == count_flops(frame, params["u"]) + 4**3


# -- projection of householder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "k"), mostly_long([(10, 6, 3), (7, 12, 7), (13, 13, 13)], [(10, 6, 3)]))
def test_projection_is_the_leading_singular_subspaces(n, m, k):
    w = normal(n, m)
    found = structmat.project(w, f"householder(reflections={k})")
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(found.materialize(), u[:, :k] @ vt[:k], atol=1e-5)
    error = np.sqrt(((s[:k] - 1) ** 2).sum() + (s[k:] ** 2).sum())
    assert np.linalg.norm(w - found.materialize()) == pytest.approx(error, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("d", [6, 9, 32])
@pytest.mark.parametrize("sign", [1, -1])
def test_orthogonal_matrices_are_kept(d, sign):
    """Of either determinant: the last of d reflections and the signs make up for the parity."""
    q = orthonormal(d, d)
    q[:, 0] *= sign * np.sign(np.linalg.det(q))
    assert np.linalg.det(q) == pytest.approx(sign, rel=1e-4)
    found = structmat.project(q, f"householder(reflections={d})")
    np.testing.assert_allclose(found.materialize(), q, atol=1e-5)
    with jax.enable_x64(True):
        exact = np.linalg.qr(q.astype(np.float64))[0]
        found = structmat.project(exact, f"householder(reflections={d})")
        np.testing.assert_allclose(found.materialize(), exact, atol=1e-13)


def test_degenerate_matrices():
    """No direction, or fewer than k: still k ones."""
    bound = structmat.parse("householder(reflections=3)").bind(6, 5)
    for w in (np.zeros((6, 5), np.float32), np.outer(normal(6), normal(5, seed=1))):
        params = jax.jit(bound.project)(w)
        np.testing.assert_allclose(singular_values(bound, params), [1, 1, 1, 0, 0], atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize(("n", "m", "side"), [(5, 8, "in_gram"), (8, 5, "out_gram"), (6, 6, "in_gram")])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_procrustes(n, m, side, kind):
    """With one gram on a side of k coordinates: orthogonal Procrustes, as scipy solves it."""
    rng, size = np.random.default_rng(0), n if side == "in_gram" else m
    root = rng.normal(size=(40, size)) * (rng.uniform(0.1, 3, size))
    gram = root.T @ root if kind == "full" else np.diag((root**2).sum(0))
    w = normal(n, m)
    bound = structmat.parse(f"householder(reflections={size})").bind(n, m)
    given = jnp.asarray(gram if kind == "full" else np.diag(gram), jnp.float32)
    found = np.asarray(bound.materialize(bound.project(w, **{side: given})))
    target = gram @ w if side == "in_gram" else w @ gram
    u, _, vt = np.linalg.svd(target, full_matrices=False)
    np.testing.assert_allclose(found, u @ vt, atol=2e-5)
    if n == m:
        np.testing.assert_allclose(found, scipy.linalg.orthogonal_procrustes(np.eye(n), target)[0], atol=2e-5)
    weight = np.linalg.cholesky(gram).T
    error = lambda q: np.linalg.norm(weight @ (w - q) if side == "in_gram" else (w - q) @ weight.T)
    for seed in range(20):
        other = bound.project(w + 0.1 * normal(n, m, seed=seed + 1))
        assert error(found) <= error(np.asarray(bound.materialize(other))) * (1 + 1e-6)


def test_other_grams_are_refused():
    bound, w = structmat.parse("householder(reflections=4)").bind(5, 6), normal(5, 6)
    for grams in ({"in_gram": jnp.ones(5)}, {"out_gram": jnp.ones(6)}):
        with pytest.raises(StructureError, match=r"no closed form with (in|out)_gram unless .* reflections=[56]"):
            bound.project(w, **grams)
    square = structmat.parse("householder(reflections=5)").bind(5, 5)
    with pytest.raises(StructureError, match="the only gram"):
        square.project(w[:, :5], in_gram=jnp.ones(5), out_gram=jnp.ones(5))
    with pytest.raises(StructureError, match="its reflections are real"):
        bound.project(w.astype(np.complex64))


# -- permutation and identity --------------------------------------------------------------------------------------------


def test_permutation_is_one_gather():
    bound = structmat.parse("permutation()").bind(7, 7)
    params = jax.jit(bound.init)(jax.random.key(3))
    index, x = np.asarray(params["index"]), normal(4, 7)
    assert index.dtype == np.int32 and sorted(index) == list(range(7)) and np.any(index != np.arange(7))
    np.testing.assert_array_equal(bound.matmul(params, x), x[:, index])
    np.testing.assert_array_equal(bound.rmatmul(params, x)[:, index], x)
    w = np.asarray(bound.materialize(params))
    assert np.all(w[index, np.arange(7)] == 1) and w.sum() == 7
    assert (bound.params, bound.cost(3).flops, bound.cost(3).bits) == (0, 0, 32 * 7)
    different = {tuple(np.asarray(bound.init(jax.random.key(k))["index"])) for k in range(5)}
    assert len(different) == 5


@pytest.mark.parametrize("n", [1, 6, 40])
def test_nearest_permutation_is_scipys(n):
    w = normal(n, n)
    index = np.asarray(jax.jit(structmat.parse("permutation()").bind(n, n).project)(w)["index"])
    rows, columns = scipy.optimize.linear_sum_assignment(w, maximize=True)
    assert w[index, np.arange(n)].sum() == pytest.approx(w[rows, columns].sum(), rel=1e-5)


GRAMS = {
    "diagonal, diagonal": (1, 1),
    "full": (2, 0),
    "none, full": (0, 2),
    "full, diagonal": (2, 1),
    "diagonal, full": (1, 2),
}


@pytest.mark.parametrize("kinds", GRAMS.values(), ids=GRAMS)
def test_weighted_permutation_beats_all_others(kinds):
    """Against all 120 of them, with any gram on one side and a diagonal one on the other."""
    rng = np.random.default_rng(2)
    full = [(a := rng.normal(size=(5, 5)) * [1, 2, 3, 4, 5]).T @ a for _ in kinds]
    full = [g if kind == 2 else np.diag(np.diag(g)) if kind == 1 else np.eye(5) for g, kind in zip(full, kinds)]
    grams = {
        side: jnp.asarray(np.diag(g) if kind == 1 else g, jnp.float32)
        for side, g, kind in zip(("in_gram", "out_gram"), full, kinds)
        if kind
    }
    bound, w = structmat.parse("permutation()").bind(5, 5), normal(5, 5, seed=4) / 2
    error = lambda index: np.trace((w - np.eye(5)[:, index]).T @ full[0] @ (w - np.eye(5)[:, index]) @ full[1])
    best = min(map(error, (list(p) for p in itertools.permutations(range(5)))))
    found = bound.project(w, **grams)["index"]
    assert error(np.asarray(found)) == pytest.approx(best, rel=1e-5)


def test_stacks_of_permutations_and_refusals():
    bound = structmat.parse("permutation()").bind(6, 6)
    members = np.stack([np.eye(6, dtype=np.float32)[:, np.random.default_rng(k).permutation(6)] for k in range(4)])
    stacked = jax.jit(jax.vmap(bound.project))(members)
    np.testing.assert_array_equal(jax.vmap(bound.materialize)(stacked), members)
    with pytest.raises(StructureError, match="no closed form with a full in_gram and a full out_gram"):
        bound.project(members[0], in_gram=jnp.eye(6), out_gram=jnp.eye(6))
    with pytest.raises(StructureError, match=r"in_gram must have shape \(6,\) or \(6, 6\), got \(5,\)"):
        bound.project(members[0], in_gram=jnp.ones(5))


@pytest.mark.parametrize("name", ["permutation", "identity"])
def test_square_only(name):
    with pytest.raises(StructureError, match=rf"{name}: needs a square weight, got \(4, 6\)"):
        structmat.parse(f"{name}()").bind(4, 6)


def test_identity_is_neutral():
    bound = structmat.parse("identity() @ low_rank(rank=2) @ permutation()").bind(6, 6)
    params = bound.init(jax.random.key(0), jnp.bfloat16)
    assert params["0"]["0"] == {}
    w = np.asarray(bound.a.b.materialize(params["0"]["1"]), np.float32)
    np.testing.assert_array_equal(np.asarray(bound.materialize(params), np.float32), w[:, params["1"]["index"]])
    assert bound.materialize(params).dtype == jnp.bfloat16, "a factor without floats takes the others' dtype"
    assert bound.a.a.project(w) == {} and bound.a.a.cost(3).bits == 0
    start = structmat.parse("frozen(identity()) + low_rank(rank=2)").bind(6, 6)
    np.testing.assert_array_equal(start.materialize(start.init(jax.random.key(0))), np.eye(6))
