"""BLAST against the families it contains, its closed-form steps, and the descent its paper uses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat import StructureError, parse
from structmat.structures.blast import Blast, _descend, _from_noise, _from_svd, _step, _sweep

INDEX = np.arange(64)
AR1 = 0.5 ** np.abs(INDEX[:, None] - INDEX)
GAUSS = np.random.default_rng(5).normal(size=(64, 64))
DECAY = np.linalg.qr(GAUSS)[0] * (1 / (1 + INDEX)) @ np.linalg.qr(GAUSS.T)[0]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def draw(bound, seed=0, couplings=None):
    values = {
        n: np.random.default_rng(seed + 7 * k).normal(size=leaf.shape)
        for k, (n, leaf) in enumerate(bound.leaves().items())
    }
    if couplings is not None:
        values["s"] = couplings
    return {n: jnp.asarray(v) for n, v in values.items()}


@functools.partial(jax.jit, static_argnums=0)
def relative_error(bound, w, key=None, like=None):
    return jnp.linalg.norm(w - bound.materialize(bound.project(w, key=key, like=like))) / jnp.linalg.norm(w)


@functools.partial(jax.jit, static_argnums=0)
def project(bound, w, **grams):
    """Parameters and matrix."""
    params = bound.project(w, **grams)
    return params, bound.materialize(params)


def error(bound, w, **kwargs):
    return float(relative_error(bound, jnp.asarray(w), **kwargs))


def blocks(w, b):
    return jnp.asarray(w).reshape(b, w.shape[0] // b, b, w.shape[1] // b).transpose(0, 2, 1, 3)


def test_matrix_is_the_block_formula():
    bound = Blast(3, 4).bind(12, 18)
    params = draw(bound)
    u, s, v = (np.asarray(params[n]) for n in "usv")
    w = np.block([[u[k] @ np.diag(s[:, k, l]) @ v[l] for l in range(3)] for k in range(3)])
    np.testing.assert_allclose(bound.materialize(params), w, atol=1e-5)


def test_members_of_other_families():
    """Couplings 1: low rank. One block: low rank. No coupling across: block diagonal with blocks of that rank."""
    low = parse("low_rank(rank=4)").bind(12, 18)
    ones = draw(Blast(3, 4).bind(12, 18), couplings=np.ones((4, 3, 3)))
    flat = {"a": ones["u"].reshape(12, 4).T, "b": ones["v"].transpose(1, 0, 2).reshape(4, 18)}
    np.testing.assert_allclose(Blast(3, 4).bind(12, 18).materialize(ones), low.materialize(flat), atol=1e-5)
    single = draw(Blast(1, 4).bind(12, 18))
    flat = {"a": single["u"][0].T * single["s"][:, 0], "b": single["v"][0]}
    np.testing.assert_allclose(Blast(1, 4).bind(12, 18).materialize(single), low.materialize(flat), atol=1e-5)
    w = normal(3, 12, 18).astype(jnp.float32)
    assert error(Blast(1, 4).bind(12, 18), w) == pytest.approx(error(low, w), rel=1e-5), "one block: the SVD is optimal"

    full = Blast(3, 4).bind(12, 18)
    member = draw(full, couplings=np.eye(3) * np.ones((4, 1, 1)))
    diagonal = parse("block_diagonal(blocks=3)").bind(12, 18)
    inner = {"blocks": member["u"] @ member["v"]}
    assert jax.tree.map(jnp.shape, inner) == {n: leaf.shape for n, leaf in diagonal.leaves().items()}
    np.testing.assert_allclose(full.materialize(member), diagonal.materialize(inner), atol=1e-5)


@pytest.mark.parametrize("w", [AR1, GAUSS, DECAY, np.tril(np.ones((64, 64)))], ids=["ar1", "gauss", "decay", "lower"])
def test_never_worse_than_low_rank(w):
    """The descent starts at the truncated SVD; on these matrices block couplings pay."""
    w = w.astype(np.float32)
    assert error(Blast(4, 8).bind(64, 64), w) < 0.99 * error(parse("low_rank(rank=8)").bind(64, 64), w)


@pytest.mark.long
def test_planted_members_are_recovered():
    """To 1e-6 in double precision from the SVD alone for positive couplings; for normal ones with a few random starts."""
    with jax.enable_x64(True):
        bound = Blast(8, 4).bind(64, 64)
        positive = [np.random.default_rng(k).uniform(size=(4, 8, 8)) for k in range(3)]
        for seed, s in enumerate(positive):
            assert error(bound, bound.materialize(draw(bound, seed, s))) < 1e-6
        for seed in range(3):
            member = bound.materialize(draw(bound, seed))
            keys = [None, *jax.random.split(jax.random.key(seed), 6)]
            assert any(error(bound, member, key=k) < 1e-6 for k in keys)


@pytest.mark.long
def test_a_random_start_can_only_help():
    with jax.enable_x64(True):
        bound = Blast(8, 4).bind(64, 64)
        assert error(bound, AR1, key=jax.random.key(0)) <= error(bound, AR1) * (1 + 1e-12)


def by_gradient(w, b, r, precondition, seed=0, steps=300):
    """The paper's descent in numpy: gradient steps on u, v, s in turn, step size falling linearly from 1 to 0.01 of it.

    Preconditioned by (H + 0.1 |residual| I)^-1; plain steps are 1 / (largest eigenvalue of H).
    """
    rng = np.random.default_rng(seed)
    n, m = w.shape
    t = np.asarray(blocks(w / w.std(), b))
    u, v = (1e-3 / r**0.5 * rng.normal(size=shape) for shape in ((b, n // b, r), (b, r, m // b)))
    c = rng.normal(size=(b, b, r))
    einsum = functools.partial(np.einsum, optimize=True)
    residual = lambda: einsum("kpr,klr,lrq->klpq", u, c, v) - t

    def move(h, gradient, lr):
        lift = 0.1 * np.linalg.norm(residual()) * np.eye(r)
        inverse = np.linalg.inv(h + lift) if precondition else np.eye(r) / (np.linalg.eigvalsh(h).max() + 1e-30)
        return lr * inverse @ (2 * gradient)

    for step in range(steps):
        lr = (1 - 0.99 * step / steps) * (1 if precondition else 0.5)
        h = einsum("klr,klt,lrq,ltq->krt", c, c, v, v)
        u = u - move(h, einsum("klpq,klr,lrq->krp", residual(), c, v), lr).swapaxes(1, 2)
        h = einsum("klr,klt,kpr,kpt->lrt", c, c, u, u)
        v = v - move(h, einsum("klpq,klr,kpr->lrq", residual(), c, u), lr)
        h = einsum("kpr,kpt,lrq,ltq->klrt", u, u, v, v)
        c = c - move(h, einsum("klpq,kpr,lrq->klr", residual(), u, v)[..., None], lr)[..., 0]
    return float(np.linalg.norm(residual()) / np.linalg.norm(t))


@pytest.mark.long
def test_against_the_descent_of_the_paper():
    """No worse than 300 of its iterations; unpreconditioned it does not come near a planted member, as the paper says."""
    with jax.enable_x64(True):
        for w, b, r in ((AR1, 4, 8), (GAUSS, 8, 4), (DECAY, 4, 8)):
            assert error(Blast(b, r).bind(64, 64), w) < 1.02 * by_gradient(w, b, r, True)
        bound = Blast(8, 4).bind(64, 64)
        member = np.asarray(bound.materialize(draw(bound, 0, np.random.default_rng(0).uniform(size=(4, 8, 8)))))
        assert by_gradient(member, 8, 4, True) < 1e-6
        assert by_gradient(member, 8, 4, False) > 1e-2


def test_every_sweep_lowers_the_error():
    """For any relaxation below 2 and any damping, from noise."""
    with jax.enable_x64(True):
        t = blocks(normal(0, 24, 36), 3)

        @functools.partial(jax.vmap, in_axes=(0, 0))
        def errors(relax, damping):
            def sweep(state, _):
                new = _sweep(t, *state, functools.partial(_step, relax=relax, damping=damping))
                return new, jnp.linalg.norm(t - jnp.einsum("kpr,rkl,lrq->klpq", *new))

            return jax.lax.scan(sweep, _from_noise(jax.random.key(1), t, 5), length=8)[1]

        relax, damping = np.array(list(itertools.product([1.0, 1.5, 1.9], [0.0, 0.5]))).T
        assert np.all(np.diff(jax.jit(errors)(jnp.asarray(relax), jnp.asarray(damping)), axis=1) < 0)


def test_steps_are_least_squares():
    """Undamped and unrelaxed, the factor solved last equals numpy's least squares block by block."""
    with jax.enable_x64(True):
        t = blocks(normal(0, 24, 36), 3)
        exact = functools.partial(_step, relax=1.0, damping=0.0)
        u, s, v = jax.jit(lambda t: _sweep(t, *_from_noise(jax.random.key(1), t, 5), exact))(t)
        for k, l in itertools.product(range(3), repeat=2):
            design = np.einsum("pr,rq->pqr", u[k], v[l]).reshape(-1, 5)
            np.testing.assert_allclose(s[:, k, l], np.linalg.lstsq(design, t[k, l].ravel())[0], rtol=1e-8)
        first = lambda h, x, right: exact(h, x, right) if x.shape == (3, 5, 8) else x
        moved, _, _ = jax.jit(lambda *state: _sweep(t, *state, first))(u, s, v)
        for k in range(3):
            design = np.concatenate([s[:, k, l][:, None] * v[l] for l in range(3)], axis=1)
            rows = np.concatenate(list(t[k]), axis=1)
            np.testing.assert_allclose(moved[k].T, np.linalg.lstsq(design.T, rows.T)[0], rtol=1e-8)


@pytest.mark.long
def test_diagonal_grams_weigh_rows_and_columns():
    """The weighted problem is the plain one on the scaled matrix; a start is scaled along."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        a, b, w = rng.uniform(0.1, 3, 24), rng.uniform(0.1, 3, 36), rng.normal(size=(24, 36))
        bound = Blast(3, 4).bind(24, 36)
        scale = lambda w: a[:, None] ** 0.5 * w * b**0.5
        grams = {"in_gram": jnp.asarray(a), "out_gram": jnp.asarray(b)}
        (_, found), (_, plain), (like, near) = project(bound, w, **grams), project(bound, scale(w)), project(bound, w)
        weighted = lambda matrix: float(jnp.linalg.norm(scale(w - matrix)))
        assert weighted(found) == pytest.approx(float(jnp.linalg.norm(scale(w) - plain)), rel=1e-9)
        assert weighted(project(bound, w, like=like, **grams)[1]) < weighted(near)
        with pytest.raises(StructureError, match="a full in_gram couples the blocks"):
            bound.project(jnp.asarray(w), in_gram=jnp.diag(jnp.asarray(a)))


def test_singular_systems_stay_finite():
    """Zero matrices, zero blocks and ranks below r make the normal equations singular."""
    bound = Blast(3, 6).bind(12, 18)
    rank_one = np.outer(np.arange(12.0), np.ones(18))
    corner = np.zeros((12, 18))
    corner[:4, :6] = np.arange(24).reshape(4, 6)
    for w in (np.zeros((12, 18)), rank_one, corner):
        params, found = project(bound, w.astype(np.float32))
        assert all(np.all(np.isfinite(p)) for p in params.values())
        np.testing.assert_allclose(found, w, atol=2e-5 * np.abs(w).max())


def test_empty_blocks_do_not_stop_the_descent():
    """A zero factor makes the couplings of its block row free; the other blocks still move."""
    bound, w = Blast(3, 3).bind(12, 18), normal(0, 12, 18).astype(jnp.float32)
    w = w.at[:4].set(0)
    like = jax.tree.map(lambda p: p.astype(jnp.float32), draw(bound))
    like["u"] = like["u"].at[0].set(0)
    assert error(bound, w, like=like) < 0.9 * error(parse("low_rank(rank=3)").bind(12, 18), w)


def test_gauge():
    """Couplings have RMS 1, u and v equal norms and u's largest entry is positive, per rank index."""
    params, _ = project(Blast(3, 4).bind(24, 36), normal(4, 24, 36))
    np.testing.assert_allclose(jnp.mean(params["s"] ** 2, (1, 2)), 1, rtol=1e-5)
    u = np.asarray(params["u"]).reshape(24, 4)
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), jnp.linalg.norm(params["v"], axis=(0, 2)), rtol=1e-5)
    assert np.all(u[np.abs(u).argmax(0), range(4)] > 0)


@pytest.mark.long
def test_stacks():
    """Under vmap the descents stop one by one and give what each gives alone."""
    bound = Blast(2, 3).bind(12, 8)
    member = bound.materialize(draw(bound))
    stack = jnp.stack([normal(0, 12, 8).astype(jnp.float32), member, jnp.zeros((12, 8))])
    together = jax.jit(jax.vmap(lambda w: bound.materialize(bound.project(w))))(stack)
    for w, found in zip(stack, together):
        _, alone = project(bound, w)
        assert abs(jnp.linalg.norm(w - found) - jnp.linalg.norm(w - alone)) < 1e-4 * (1 + jnp.linalg.norm(w))


@pytest.mark.long
def test_descent_stops_on_members():
    t = blocks(Blast(3, 4).bind(24, 36).materialize(draw(Blast(3, 4).bind(24, 36))), 3)
    start = _from_svd(t, 12)
    *state, found = _descend(t, *start)
    assert found < 1e-5 * jnp.linalg.norm(t) and all(map(jnp.array_equal, state, start)), "exact at once: nothing moves"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blast()", r"blast needs blocks=\.\.\."),
        ("blast(blocks=3)", r"blast needs rank=\.\.\."),
        ("blast(5, 2)", r"blocks=5 does not fit a weight of shape \(24, 36\); nearest valid: 1, 2, 3, 4, 6, 12"),
        ("blast(3, 25)", r"rank=25 does not fit a weight of shape \(24, 36\); nearest valid: 19, 20, 21, 22, 23, 24"),
    ],
)
def test_sizes_are_answered(text, message):
    with pytest.raises(StructureError, match=message):
        parse(text).bind(24, 36)


def test_fit_chooses_the_rank():
    found = parse("fit(blast(blocks=4), params=0.5)").bind(64, 64)
    assert found.params <= 0.5 * 64 * 64 < Blast(4, found.structure.rank + 1).bind(64, 64).params
    assert found.params == found.structure.rank * (64 + 64 + 16)
