"""What `project` promises: the optimum where it is known, never worse than `like`, exact on members."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.structures.algebra import BoundSum
from tests.marks import thinned
from tests.structures.cases import CASES, bind, dense, draw, is_float, outside, projects, with_long

PROJECTED = [c for c in CASES if projects(bind(c))]
every = pytest.mark.parametrize("case", with_long(PROJECTED))


@functools.cache
def solver(case):
    """(w, like) -> (parameters of the projection, their matrix), compiled."""
    bound = bind(case)

    @jax.jit
    def solve(w, like):
        params = bound.project(w, key=jax.random.key(1), like=like)
        return params, bound.materialize(params)

    return solve


def shaken(params, size, seed):
    """Parameters near the given ones."""
    rng = np.random.default_rng(seed)
    noise = lambda p: p + size * np.asarray(rng.normal(size=p.shape), p.dtype) if is_float(p) else p
    return jax.tree.map(noise, params)


@pytest.mark.parametrize("case", with_long(PROJECTED, 2))
def test_projection(case):
    bound, solve, w = bind(case), solver(case), outside(case)
    matrix = jax.jit(bound.materialize)
    params, nearest = solve(w, draw(case))
    error = np.linalg.norm(w - nearest)
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    jax.tree.map(lambda p, s: np.testing.assert_equal((p.shape, p.dtype), (s.shape, s.dtype)), params, shapes)

    assert error <= np.linalg.norm(w - dense(case)) * (1 + 1e-6), "worse than like"
    _, again = solve(nearest, params)
    assert np.linalg.norm(nearest - again) <= 2e-5 * np.linalg.norm(nearest), "not idempotent"
    for seed in range(3):
        near = shaken(params, 0.01, seed)
        _, from_near = solve(w, near)
        assert np.linalg.norm(w - from_near) <= np.linalg.norm(w - matrix(near)) * (1 + 1e-6), "worse than like"
    if not isinstance(bound, BoundSum):
        member = dense(case)
        assert np.linalg.norm(member - solve(member, draw(case))[1]) <= 2e-5 * np.linalg.norm(member), "member moves"
    if bound.exact:
        for seed in range(3):
            for other in (draw(case, seed), shaken(params, 0.01, seed), shaken(params, 0.1, seed)):
                assert error <= np.linalg.norm(w - matrix(other)) * (1 + 1e-6), "a member is nearer"


def psd(n, rng):
    a = rng.normal(size=(n, n))
    return (a @ a.T / n + 0.1 * np.eye(n)).astype(np.float32)


def weighted(w, in_gram, out_gram):
    """|A^(1/2) w B^(1/2)| in double precision by trace(w^* A w B)."""
    full = lambda g, n: np.eye(n) if g is None else np.diag(g) if g.ndim == 1 else g.astype(np.float64)
    a, b = full(in_gram, w.shape[0]), full(out_gram, w.shape[1])
    w = np.asarray(w, np.complex128)
    return np.sqrt(np.trace(w.conj().T @ a @ w @ b).real)


@pytest.mark.parametrize("case", with_long(PROJECTED, 2))
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_grams(case, kind):
    """With a gram: the weighted optimum, or an error that says the family has no closed form."""
    bound, w, rng = bind(case), outside(case), np.random.default_rng(1)
    gram = (lambda n: rng.uniform(0.1, 3, n).astype(np.float32)) if kind == "diagonal" else (lambda n: psd(n, rng))
    grams = {"in_gram": gram(bound.d_in), "out_gram": gram(bound.d_out)}
    closed = bound.grams in (("full",) if kind == "full" else ("full", "diagonal"))
    try:
        params = jax.jit(bound.project)(w, **grams, key=jax.random.key(1))
    except StructureError as error:
        assert "gram" in str(error) and "no closed form" in str(error)
        assert not closed, "a closed form is refused"
        return
    assert closed, "a gram is taken that is not declared"
    matrix = jax.jit(bound.materialize)
    best = weighted(w - matrix(params), **grams)
    if bound.exact:
        near = [shaken(params, size, seed) for seed in range(4) for size in (0.003, 0.03)]
        assert all(best <= weighted(w - matrix(p), **grams) * (1 + 1e-5) for p in near), "a member is nearer"
    else:
        assert best < weighted(w, **grams), "worse than nothing"


@pytest.mark.parametrize("text", ["dense()", "low_rank(rank=5)", "spectral(rank=5)"])
@pytest.mark.parametrize("sides", [("in_gram",), ("out_gram",), ("in_gram", "out_gram")], ids="+".join)
def test_full_gram_against_the_whitened_svd(text, sides):
    """The weighted error is the tail of the singular values of A^(1/2) w B^(1/2), which numpy computes."""
    rng = np.random.default_rng(5)
    bound, w = structmat.parse(text).bind(12, 18), rng.normal(size=(12, 18)).astype(np.float32)
    grams = {"in_gram": psd(12, rng), "out_gram": psd(18, rng)}
    grams = {k: grams[k] if k in sides else None for k in grams}
    root = lambda g, n: np.eye(n) if g is None else np.linalg.cholesky(g.astype(np.float64)).T
    white = root(grams["in_gram"], 12) @ w @ root(grams["out_gram"], 18).T
    tail = np.linalg.svd(white, compute_uv=False)[getattr(bound.structure, "rank", 12) :]
    params = bound.project(w, **{k: None if g is None else jnp.asarray(g) for k, g in grams.items()})
    assert weighted(w - bound.materialize(params), **grams) == pytest.approx(np.linalg.norm(tail), rel=1e-4, abs=1e-3)
    if text.startswith("spectral"):
        for leaf in ("u", "v"):
            np.testing.assert_allclose(params[leaf] @ params[leaf].T, np.eye(5), atol=1e-5)
        assert np.all(np.diff(params["s"]) <= 0)


def test_singular_grams_weigh_only_what_they_see():
    """Directions without weight cost nothing, and follow w as far as the rank goes."""
    w = outside(("dense()", 12, 18))
    gram = np.zeros(12, np.float32)
    gram[:3] = 1
    bound = structmat.parse("low_rank(rank=3)").bind(12, 18)
    for in_gram in (gram, np.diag(gram)):
        found = bound.materialize(bound.project(w, in_gram=jnp.asarray(in_gram)))
        np.testing.assert_allclose(found[:3], w[:3], atol=1e-5)
        rows = np.linalg.svd(w[:3], full_matrices=False)[2]
        np.testing.assert_allclose(found[3:], w[3:] @ rows.T @ rows, atol=1e-5)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones(5, np.float32), r"in_gram must have shape \(12,\) or \(12, 12\), got \(5,\)"),
        (-np.ones(12, np.float32), "must not have negative entries; smallest is -1"),
    ],
)
@pytest.mark.parametrize(
    "text", ["low_rank(rank=2)", "spectral(rank=2)", "block_diagonal(blocks=2)", "monarch(blocks=2)"]
)
def test_bad_grams(text, gram, message):
    with pytest.raises(StructureError, match=message):
        structmat.parse(text).bind(12, 12).project(jnp.ones((12, 12)), in_gram=jnp.asarray(gram))


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("low_rank(rank={})", (1, 4, 16)),
        ("spectral(rank={})", (1, 4, 16)),
        ("block_diagonal(blocks={})", (8, 4, 2, 1)),
        ("block_low_rank(in_blocks=4, out_blocks=2, rank={})", (1, 2, 3, 4)),
        ("monarch(blocks={})", (4, 2, 1)),
        ("kronecker(terms={})", (1, 4, 16)),
        ("tensor_train(rank={})", (1, 4, 16)),
        ("tensor_train(rank={}, cores=3)", (1, 2, 4, 8)),
        ("tensor_train(rank={}, cores=4)", (1, 2, 4, 8, 16)),
    ],
)
def test_error_falls_with_size(form, sizes):
    w = np.random.default_rng(2).normal(size=(16, 24)).astype(np.float32)
    errors = [float(jax.jit(lambda w, n=n: structmat.project(w, form.format(n)).error(w))(w)) for n in sizes]
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-5


@pytest.mark.parametrize(
    "text",
    thinned(["low_rank(rank=2)", "spectral(rank=2)", "block_low_rank(in_blocks=2, out_blocks=2, rank=1)",
             "kronecker(terms=2)", "tensor_train(rank=2, cores=3)", "block_diagonal(blocks=2)"], 2),
)  # fmt: skip
def test_complex_matrices(text):
    """A complex matrix gives complex parameters; a member is recovered."""
    rng = np.random.default_rng(3)
    bound = structmat.parse(text).bind(12, 8)
    real = jax.eval_shape(bound.init, jax.random.key(0))
    normal = lambda s: (rng.normal(size=s.shape) + 1j * rng.normal(size=s.shape)).astype(np.complex64)
    params = jax.tree.map(lambda s: jnp.asarray(normal(s)), real)
    member = np.asarray(bound.materialize(params))
    found = jax.jit(bound.project)(member)
    assert {k for k, p in found.items() if p.dtype == np.complex64} == set(found) - {"s"}
    np.testing.assert_allclose(bound.materialize(found), member, atol=1e-5 * np.abs(member).max())
    x = normal(jax.ShapeDtypeStruct((3, 12), np.complex64))
    np.testing.assert_allclose(bound.matmul(found, x), x @ member, atol=1e-5 * np.abs(x @ member).max())


def test_bfloat16_is_projected_in_float32():
    w = outside(("dense()", 12, 18))
    for text in ("low_rank(rank=4)", "tensor_train(rank=3, cores=3)"):
        bound = structmat.parse(text).bind(12, 18)
        params = bound.project(jnp.asarray(w, jnp.bfloat16))
        assert {p.dtype for p in params.values()} == {jnp.dtype("bfloat16")}
        best = np.linalg.norm(w - bound.materialize(bound.project(w)))
        assert np.linalg.norm(w - np.asarray(bound.materialize(params), np.float32)) < best * 1.01


@pytest.mark.parametrize("text", ["low_rank(rank=2)", "monarch(blocks=2)", "low_rank(rank=2) + diagonal()"])
def test_wrong_shape(text):
    with pytest.raises(StructureError, match=r"cannot project an array of shape \(4, 12\); expected \(12, 12\)"):
        structmat.parse(text).bind(12, 12).project(jnp.ones((4, 12)))


def test_products_are_refused():
    with pytest.raises(StructureError, match="no projection onto a general product"):
        structmat.project(jnp.ones((12, 12)), "diagonal() @ dense()")


def test_signs_are_fixed():
    """The entry of largest modulus of every left vector is positive, whatever the sign of the matrix."""
    w = outside(("dense()", 12, 18))
    for sign in (1, -1):
        left = structmat.project(sign * w, "spectral(rank=5)").params["u"]
        assert np.all(np.take_along_axis(left, np.abs(left).argmax(1)[:, None], 1) > 0)


def test_sum_takes_the_better_of_both_worlds():
    """Alternating projections recover low rank plus block diagonal far better than the greedy start."""
    rng = np.random.default_rng(6)
    w = (10 * rng.normal(size=(16, 1)) @ rng.normal(size=(1, 16))).astype(np.float32)
    w[:8, :8] += rng.normal(size=(8, 8))
    w[8:, 8:] += rng.normal(size=(8, 8))
    both = "low_rank(rank=1) + block_diagonal(blocks=2)"
    greedy = structmat.project(w - structmat.project(w, "low_rank(rank=1)").materialize(), "block_diagonal(blocks=2)")
    first = np.linalg.norm(w - structmat.project(w, "low_rank(rank=1)").materialize() - greedy.materialize())
    assert np.linalg.norm(w - structmat.project(w, both).materialize()) < 0.2 * first


def test_nothing_is_lost_to_a_frozen_dense_term():
    w = outside(("dense()", 12, 18))
    np.testing.assert_allclose(structmat.project(w, "frozen(dense()) + low_rank(rank=2)").materialize(), w, atol=1e-6)
