"""Dictionary: matching pursuit against scikit-learn, alternations that never rise, planted problems, grams, counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import DictionaryLearning
from sklearn.linear_model import orthogonal_mp

import structmat
from structmat.structures import StructureError
from structmat.structures import sparse_coding as sc
from tests.marks import thinned
from tests.structures.flops import count_flops


def bind(text, n, m):
    return structmat.parse(text).bind(n, m)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def unit(d):
    return d / np.linalg.norm(d, axis=0)


def sparse_code(seed, k, m, s):
    """(k, m) with s standard normal entries in every column."""
    rng = np.random.default_rng(seed)
    z = np.zeros((k, m))
    for column in z.T:
        column[rng.choice(k, s, replace=False)] = rng.normal(size=s)
    return z


@functools.cache
def projector(text, n, m):
    bound = bind(text, n, m)
    return jax.jit(lambda w, like=None, **grams: bound.project(w, like=like, **grams)), jax.jit(bound.materialize)


def error(text, w, **kwargs):
    """Relative error of the projection of w."""
    solve, matrix = projector(text, *w.shape)
    return float(jnp.linalg.norm(w - matrix(solve(w, **kwargs))) / jnp.linalg.norm(w))


# -- coding ----------------------------------------------------------------------------------------------------------


def pursue(t, d, count):
    values, rows = sc.pursue(jnp.asarray(t), jnp.asarray(d), count)
    assert np.all(np.diff(rows, axis=1) > 0)
    return np.asarray(sc.dense_code((values, rows), d.shape[1]))


@pytest.mark.long
@pytest.mark.parametrize(("n", "k"), [(20, 14), (12, 30)])
def test_matching_pursuit_equals_scikit_learn(n, k):
    d, t = unit(normal(0, n, k)), normal(1, n, 50)
    before = np.linalg.norm(t, axis=0)
    with jax.enable_x64(True):
        for count in (1, 3, 7):
            z = pursue(t, d, count)
            np.testing.assert_allclose(z, orthogonal_mp(d, t, n_nonzero_coefs=count), atol=1e-10)
            left = np.linalg.norm(t - d @ z, axis=0)
            assert np.all(left < before)
            before = left


def test_matching_pursuit_of_batches_is_that_of_the_whole(monkeypatch):
    d, t = unit(normal(0, 9, 12)), normal(1, 9, 23)
    gram, correlations = jnp.asarray(d.T @ d), jnp.asarray(d.T @ t)
    whole = sc.matching_pursuit(gram, correlations, 4)
    monkeypatch.setattr(sc, "TABLE", {jax.default_backend(): 5 * 16})
    batches = sc.matching_pursuit.__wrapped__(gram, correlations, 4)
    np.testing.assert_array_equal(whole[1], batches[1])
    np.testing.assert_allclose(whole[0], batches[0], atol=1e-6)


def test_dependent_atoms_and_zero_columns_stay_finite():
    d = unit(normal(0, 8, 6))
    d[:, 3], d[:, 4] = d[:, 1], -d[:, 2]
    t = np.concatenate([d[:, 1:3] @ normal(1, 2, 5), np.zeros((8, 2))], axis=1)
    z = pursue(t, d, 5)
    assert np.all(np.isfinite(z)) and not np.any(z[:, 5:])
    np.testing.assert_allclose(d @ z, t, atol=1e-5)


def test_thresholding_is_the_best_code_of_an_orthonormal_dictionary():
    d, t = np.linalg.qr(normal(0, 16, 10))[0], normal(1, 16, 30)
    with jax.enable_x64(True):
        code = sc.threshold(jnp.asarray(d.T @ t), 4)
        z = sc.dense_code(code, 10)
    np.testing.assert_allclose(z, orthogonal_mp(d, t, n_nonzero_coefs=4), atol=1e-12)
    assert np.all(np.diff(code[1], axis=1) > 0)


# -- alternations ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_orthonormal_alternations_equal_those_of_numpy_and_never_rise(monkeypatch):
    t, k, s = normal(2, 20, 40), 8, 3
    with jax.enable_x64(True):
        start = sc.spectral_start(jnp.asarray(t), k, s)
        d, before = np.linalg.svd(t)[0][:, :k], np.inf
        for count in range(5):
            c = d.T @ t
            z = np.where(np.abs(c) >= -np.sort(-np.abs(c), axis=0)[s - 1], c, 0)
            reference = np.linalg.norm(t - d @ z)
            assert reference < before
            if count in (1, 4):
                monkeypatch.setattr(sc, "ALTERNATIONS", count)
                fit = sc.orthonormal_rounds(jnp.asarray(t), start)
                assert float(fit.error) == pytest.approx(reference, rel=1e-10)
            u, _, vt = np.linalg.svd(t @ z.T, full_matrices=False)
            before, d = reference, u @ vt


@pytest.mark.long
@pytest.mark.parametrize(("n", "m", "k", "s"), [(20, 40, 10, 3), (10, 50, 16, 3), (16, 30, 8, 8)])
def test_ksvd_rounds_never_rise_and_keep_the_form(n, m, k, s):
    with jax.enable_x64(True):
        t = jnp.asarray(normal(3, n, m))
        fit, step = sc.spectral_start(t, k, s), jax.jit(sc.ksvd_round)
        first = before = float(fit.error)
        for _ in range(8):
            fit = step(t, fit)
            assert float(fit.error) <= before * (1 + 1e-12)
            before = float(fit.error)
            values, rows = fit.code
            np.testing.assert_allclose(jnp.linalg.norm(fit.dictionary, axis=0), 1, atol=1e-12)
            assert values.shape == rows.shape == (m, s) and np.all(np.diff(rows, axis=1) > 0)
            left = jnp.linalg.norm(t - fit.dictionary @ sc.dense_code(fit.code, k))
            assert before == pytest.approx(float(left), rel=1e-10)
    assert before < 0.97 * first or s == k
    assert before == pytest.approx(first) or s < k


@pytest.mark.long
def test_an_atom_no_column_uses_becomes_the_worst_fitted_column():
    t = jnp.asarray(normal(4, 12, 20), jnp.float32)
    fit = sc.spectral_start(t, 6, 1)
    idle = jnp.where(fit.code[1] == 5, 0, fit.code[1])
    new = sc._update_atoms(t, sc.fit_of(t, fit.dictionary, (fit.code[0], idle)))
    left = np.linalg.norm(sc.residual(t, new.dictionary, new.code), axis=0)
    np.testing.assert_allclose(new.dictionary[:, 5], unit(np.asarray(t))[:, left.argmax()], atol=1e-5)


@pytest.mark.long
def test_search_leaves_the_minimum_its_start_falls_into():
    """Below K-SVD from the same start, no worse than any fit given, the same for the same key; nothing to do at zero."""
    i, j = np.arange(32)[:, None], np.arange(48)
    t = jnp.asarray(0.5 ** np.abs(i - j), jnp.float32)
    run = jax.jit(lambda t, fit, key: sc.search(t, [fit], key, 2))
    start = sc.spectral_start(t, 8, 2)
    found, again = (run(t, start, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(found.dictionary, again.dictionary)
    assert float(found.error) < 0.98 * float(jax.jit(sc.ksvd_rounds)(t, start).error) < float(start.error)
    assert float(run(t, found, jax.random.key(2)).error) <= float(found.error)
    member = found.dictionary @ sc.dense_code(found.code, 8)
    solved = sc.fit_of(member, found.dictionary, found.code)
    jax.tree.map(np.testing.assert_array_equal, run(member, solved, jax.random.key(3)), solved)
    assert [sc.tries(n) for n in (64, 2**15, 2**16, 2**17, 2**18, 2**24)] == [8, 7, 3, 1, 0, 0]


# -- projection ------------------------------------------------------------------------------------------------------


def test_a_full_code_is_the_truncated_svd():
    w = normal(5, 20, 32).astype(np.float32)
    tail = np.linalg.svd(w, compute_uv=False)[6:]
    assert error("dictionary(atoms=6, nonzeros=6)", w) == pytest.approx(
        np.linalg.norm(tail) / np.linalg.norm(w), rel=1e-5
    )


@pytest.mark.long
def test_a_planted_dictionary_is_recovered_from_a_perturbed_start():
    n, k = 32, 40
    with jax.enable_x64(True):
        d, z = unit(normal(6, n, k)), sparse_code(7, k, 200, 3)
        w = jnp.asarray(d @ z)
        text = f"dictionary(atoms={k}, nonzeros=3)"
        near = jnp.asarray(unit(d + 0.05 * normal(8, n, k) / n**0.5))
        values, rows = sc.pursue(w, near, 3)
        like = {"dictionary": near, "values": values, "rows": rows}
        assert error(text, w, like=like) < 1e-6
        solve, matrix = projector(text, *w.shape)
        member = solve(w, like=like)
        again = solve(matrix(member), like=member)
        np.testing.assert_allclose(matrix(again), matrix(member), atol=1e-6)


@pytest.mark.long
def test_columns_in_a_union_of_subspaces():
    """32 columns in each of 6 planes of R^24: no low rank of the same size comes near."""
    w = np.concatenate([normal(s, 24, 2) @ normal(9 + s, 2, 32) for s in range(6)], axis=1).astype(np.float32)
    own = "dictionary(atoms=12, nonzeros=2)"
    share = bind(own, *w.shape).params / w.size
    low = bind(f"fit(low_rank(), params={share})", *w.shape)
    assert low.structure.rank == 3
    assert error(own, w) < 0.6 * error(str(low.structure), w)


@pytest.mark.long
@pytest.mark.parametrize(("n", "m", "k", "s"), [(16, 60, 12, 3), (8, 60, 16, 2)])
def test_error_is_no_worse_than_that_of_scikit_learn(n, m, k, s):
    w = normal(10, n, m)
    reference = DictionaryLearning(
        k, alpha=0.3, max_iter=40, transform_algorithm="omp", transform_n_nonzero_coefs=s, random_state=0
    ).fit(w.T)
    theirs = np.linalg.norm(w.T - reference.transform(w.T) @ reference.components_) / np.linalg.norm(w)
    assert error(f"dictionary(atoms={k}, nonzeros={s})", w.astype(np.float32)) <= theirs


@pytest.mark.long
def test_error_falls_with_size():
    w = normal(11, 16, 24).astype(np.float32)
    errors = [error(f"dictionary(atoms={k}, nonzeros={s})", w) for k, s in ((2, 2), (9, 3), (24, 1))]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5  # every column is an atom


def test_signs_are_fixed_and_atoms_have_unit_norm():
    solve, _ = projector("dictionary(atoms=9, nonzeros=3)", 16, 24)
    w = normal(12, 16, 24).astype(np.float32)
    for sign in (1, -1):
        d = np.asarray(solve(sign * w)["dictionary"])
        np.testing.assert_allclose(np.linalg.norm(d, axis=0), 1, atol=1e-5)
        assert np.all(np.take_along_axis(d, np.abs(d).argmax(0)[None], 0) > 0)


@pytest.mark.long
def test_a_stack_is_projected_as_its_members():
    solve, matrix = projector("dictionary(atoms=9, nonzeros=3)", 16, 24)
    stack = jnp.asarray(normal(13, 3, 16, 24), jnp.float32)
    both = lambda w: matrix(solve(w))
    np.testing.assert_allclose(jax.jit(jax.vmap(both))(stack), np.stack([both(w) for w in stack]), atol=1e-4)


# -- grams -----------------------------------------------------------------------------------------------------------


def psd(n, seed):
    a = normal(seed, n, n)
    return a @ a.T / n + 0.05 * np.eye(n)


def weighted(left, in_gram, out_gram):
    """Weighted error by traces."""
    a = np.diag(in_gram) if np.ndim(in_gram) == 1 else in_gram
    return np.sqrt(np.trace(left.T @ a @ left @ np.diag(out_gram)))


@pytest.mark.long
def test_grams_are_an_exact_change_of_variables():
    """The weighted error is that of the projection of A^(1/2) w B^(1/2), and below that of the plain projection."""
    with jax.enable_x64(True):
        w, a, b = normal(14, 16, 24), psd(16, 16), np.random.default_rng(15).uniform(0.01, 4, 24)
        solve, matrix = projector("dictionary(atoms=9, nonzeros=3)", 16, 24)
        found = weighted(w - matrix(solve(w, in_gram=jnp.asarray(a), out_gram=jnp.asarray(b))), a, b)
        values, vectors = np.linalg.eigh(a)
        white = (vectors * np.sqrt(values)) @ vectors.T @ w * np.sqrt(b)
        assert found == pytest.approx(float(jnp.linalg.norm(white - matrix(solve(white)))), rel=1e-6)
        assert found < 0.97 * weighted(w - matrix(solve(w)), a, b)


@pytest.mark.parametrize("dtype", thinned([np.float32, np.float64], 2))
def test_a_full_code_under_an_ill_conditioned_gram_is_the_whitened_svd(dtype):
    """Also in single precision, as no gram is inverted."""
    q = np.linalg.qr(normal(18, 12, 12))[0]
    root = q * np.logspace(0, -4, 12)
    w = normal(17, 12, 20)
    tail = np.linalg.svd(root.T @ w, compute_uv=False)[4:]
    with jax.enable_x64(True):
        solve, matrix = projector("dictionary(atoms=4, nonzeros=4)", 12, 20)
        found = np.asarray(matrix(solve(jnp.asarray(w, dtype), in_gram=jnp.asarray(root @ root.T, dtype))))
    assert weighted(w - found, root @ root.T, np.ones(20)) == pytest.approx(np.linalg.norm(tail), rel=1e-5)


@pytest.mark.long
def test_what_the_grams_do_not_see_follows_the_matrix():
    w = normal(20, 12, 20).astype(np.float32)
    solve, matrix = projector("dictionary(atoms=9, nonzeros=4)", 12, 20)
    found = matrix(solve(w, out_gram=jnp.r_[jnp.ones(10), jnp.zeros(10)]))
    assert np.linalg.norm((w - found)[:, 10:]) < np.linalg.norm(w[:, 10:])
    found = matrix(solve(w, in_gram=jnp.r_[jnp.ones(6), jnp.zeros(6)]))
    assert np.linalg.norm((w - found)[6:]) < np.linalg.norm(w[6:])


@pytest.mark.long
def test_never_worse_than_like_under_grams():
    """A start that only the weights make good."""
    bound = bind("dictionary(atoms=6, nonzeros=3)", 12, 20)
    w = jnp.asarray(normal(19, 12, 20), jnp.float32)
    gram = jnp.asarray(np.r_[np.full(6, 1e4), np.zeros(6)], jnp.float32)
    like = bound.project(w.at[6:].set(0))
    found = bound.project(w, like=like, in_gram=gram)
    seen = lambda p: float(jnp.linalg.norm((w - bound.materialize(p))[:6]))
    assert seen(found) <= seen(like) * (1 + 1e-6)


# -- accounting, sizes and errors ------------------------------------------------------------------------------------


def test_cost_counts_indices_and_every_operation():
    bound = bind("dictionary(atoms=10, nonzeros=4)", 24, 36)
    cost, params = bound.cost(5), bound.init(jax.random.key(0))
    assert (cost.params, cost.bits) == (24 * 10 + 36 * 4, 32 * (24 * 10 + 2 * 36 * 4))
    additions = 5 * 36 * 4  # of the gathers, which the counter leaves out
    assert cost.flops == cost.flops_executed == count_flops(bound.matmul, params, jnp.ones((5, 24))) + additions
    dense = bound.cost(5, path="dense").flops_executed
    assert dense == count_flops(lambda p, x: x @ bound.materialize(p), params, jnp.ones((5, 24)))


def test_fit_keeps_two_atoms_per_nonzero_or_varies_what_is_left_out():
    free = bind("fit(dictionary(), params=0.5)", 48, 96).structure
    assert (free.atoms, free.nonzeros) == (24, 12)
    assert bind("fit(dictionary(atoms=12), params=0.5)", 48, 96).structure.nonzeros == 12
    wide = bind("fit(dictionary(nonzeros=2), params=0.6)", 48, 96)
    assert wide.structure.atoms == 53 and wide.params <= 0.6 * 48 * 96 < wide.params + 48
    charged = bind("fit(dictionary(), bits=0.5)", 48, 96)
    assert charged.cost(1).bits <= 0.5 * 48 * 96 * 32 and charged.structure.atoms == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dictionary()", "needs atoms"),
        ("dictionary(atoms=4)", "needs nonzeros"),
        ("dictionary(0, 1)", "atoms must be at least 1, got 0"),
        ("dictionary(17, 1)", r"atoms=17 does not fit .*\(24, 16\).*nearest valid: .*16"),
        ("dictionary(8, 9)", "nonzeros=9 does not fit .* nearest valid: .*8"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        bind(text, 24, 16)


def test_projection_refuses_what_it_cannot_do():
    bound = bind("dictionary(4, 2)", 24, 16)
    with pytest.raises(StructureError, match=r"full out_gram .* no closed form"):
        bound.project(jnp.ones((24, 16)), out_gram=jnp.eye(16))
    with pytest.raises(StructureError, match="complex"):
        bound.project(jnp.ones((24, 16), jnp.complex64))
