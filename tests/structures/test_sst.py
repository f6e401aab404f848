"""The matrix kept as singular triplets: what it starts from, what it computes, and the gradients its vectors get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import StructuredEmbed
from structmat.optim import leaf_multiplier
from structmat.structures import StructureError, parse
from tests.marks import mostly_long
from tests.structures.flops import count_flops

SHAPES = [(12, 20, 5), (20, 12, 5), (8, 8, 8)]
by_shape = pytest.mark.parametrize(("n", "m", "r"), mostly_long(SHAPES, SHAPES[:1]))
also_full = pytest.mark.parametrize(("n", "m", "r"), mostly_long(SHAPES, SHAPES[::2]))
key = functools.partial(jax.random.key, impl="unsafe_rbg")


@functools.cache
def made(n, m, r, gain=1.0):
    bound = parse(f"sst(rank={r})").bind(n, m)
    return bound, jax.jit(lambda k: bound.init(k, gain=gain))(key(0))


def dense_draw(n, m):
    bound = parse("dense()").bind(n, m)
    return np.asarray(jax.jit(bound.init)(key(0))["kernel"])


def drawn(n, m, r):
    """Parameters that are no SVD, one of the s at zero."""
    bound, params = made(n, m, r)
    rng = np.random.default_rng(3)
    params = {name: rng.normal(size=p.shape).astype(np.float32) / 3 for name, p in params.items()}
    params["s"] = np.abs(params["s"]) * (np.arange(len(params["s"])) != 1)
    return bound, params


def triplets(params):
    """u, s, v of all of them."""
    whole = lambda side: np.concatenate([np.asarray(params[n]) for n in (side, f"{side}_rest") if n in params])
    return whole("u"), np.asarray(params["s"]), whole("v")


@by_shape
def test_starts_as_the_svd_of_the_dense_draw(n, m, r):
    bound, params = made(n, m, r)
    u, s, v = triplets(params)
    np.testing.assert_allclose((u.T * s) @ v, dense_draw(n, m), atol=2e-6)
    for vectors in (u, v):
        assert np.abs(vectors @ vectors.T - np.eye(min(n, m))).max() < 1e-5
    assert np.all(np.diff(s) <= 0) and s[-1] >= 0 and params["u"].shape == (r, n) and params["v"].shape == (r, m)
    assert ("u_rest" in params) == (r < min(n, m))
    assert bound.leaves()["s"].std == pytest.approx(np.linalg.norm(s) / s.size**0.5, rel=0.2)


def test_a_gain_acts_on_the_singular_values():
    (bound, params), (_, half), (_, zero) = (made(12, 20, 5, gain) for gain in (1.0, 0.5, 0.0))
    for name in params:
        np.testing.assert_array_equal(half[name], np.asarray(params[name]) * (0.5 if name == "s" else 1.0))
    assert (
        not np.any(zero["s"]) and np.any(zero["u"]) and bound.leaves(gain=0.5)["s"].std == bound.leaves()["s"].std / 2
    )


@by_shape
def test_products_equal_the_dense_ones(n, m, r):
    bound, params = drawn(n, m, r)
    flipped, rng, ids = bound.transpose(), np.random.default_rng(0), np.array([[0, 3], [n - 1, 3]])
    x, y = (rng.normal(size=(2, 3, d)).astype(np.float32) for d in (n, m))

    @jax.jit
    def results(p):
        first = [bound.matmul(p, x), bound.matmul(p, x[0, 0]), bound.rmatmul(p, y), bound.take(p, ids)]
        w = bound.materialize(p)
        again = bound.materialize(bound.project(w))
        return w, again, [*first, flipped.matmul(p, y), flipped.materialize(p)]

    w, again, got = (jax.tree.map(np.asarray, r) for r in results(params))
    u, s, v = triplets(params)
    np.testing.assert_allclose(w, (u.T * s) @ v, atol=1e-6)
    for a, b in zip(got, [x @ w, x[0, 0] @ w, y @ w.T, w[ids], y @ w.T, w.T]):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(again, w, atol=1e-5)


@also_full
def test_vectors_get_the_gradients_without_the_singular_value(n, m, r):
    """Against those formed from the gradient of the dense matrix, on every path to the output."""
    bound, params = drawn(n, m, r)
    rng = np.random.default_rng(1)
    x, y, dy, dx = (rng.normal(size=(2, 4, d)).astype(np.float32) for d in (n, m, m, n))
    ids = np.array([[1, 1, 0, 5], [2, 7, 1, 3]])
    train = {name: params[name] for name in "suv"}
    paths = {
        "matmul": (lambda p, x: bound.matmul(p, x), lambda w, x: x @ w, x, dy),
        "rmatmul": (lambda p, y: bound.rmatmul(p, y), lambda w, y: y @ w.T, y, dx),
        "take": (lambda p, z: bound.take(p, ids) + z, lambda w, z: w[ids] + z, y, dy),
        "materialize": (lambda p, x: x @ bound.materialize(p), lambda w, x: x @ w, x, dy),
    }

    @jax.jit
    def gradients(train):
        w = bound.materialize(params)
        own = {
            name: jax.grad(lambda t, a: jnp.sum(through(params | t, a) * d), (0, 1))(train, a)  # noqa: B023
            for name, (through, _, a, d) in paths.items()
        }
        true = {
            name: jax.grad(lambda w, a: jnp.sum(dense(w, a) * d), (0, 1))(w, a)  # noqa: B023
            for name, (_, dense, a, d) in paths.items()
        }
        return own, true

    own, true = gradients(train)
    u, s, v = triplets(params)
    for name, (got, by_input) in own.items():
        g, input_wanted = (np.asarray(a) for a in true[name])
        np.testing.assert_allclose(by_input, input_wanted, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(got["s"], np.diag(u @ g @ v.T), atol=2e-4, err_msg=name)
        np.testing.assert_allclose(got["u"], (g @ v[:r].T).T, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(got["v"], (g.T @ u[:r].T).T, atol=2e-4, err_msg=name)
        assert s[1] == 0 and np.abs(got["u"][1]).max() > 0.1 and np.abs(got["v"][1]).max() > 0.1, name


def test_a_small_step_of_all_triplets_is_the_enhanced_update():
    """W' - W over the step tends to (ds u v + s (du v + u dv)), here at r = m with an SVD as in training."""
    bound, params = made(8, 8, 8)
    x, d = (np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i in range(2))
    step = 1e-3

    @jax.jit
    def change(p):
        grads = jax.grad(lambda p: jnp.sum(bound.matmul(p, x) * d))(p)
        return bound.materialize(jax.tree.map(lambda a, g: a - step * g, p, grads)) - bound.materialize(p)

    g = x.T @ d
    u, s, v = triplets(params)
    by_u, by_v, by_s = (g @ v.T).T, (g.T @ u.T).T, np.diag(u @ g @ v.T)
    wanted = -((u.T * by_s) @ v + (by_u.T * s) @ v + (u.T * s) @ by_v)
    np.testing.assert_allclose(change(params) / step, wanted, atol=0.02 * np.abs(wanted).max())


def test_the_gradient_of_the_matrix_is_never_formed():
    bound, params = drawn(12, 20, 5)
    loss = lambda t, x: jnp.sum(bound.matmul(params | t, x) ** 2)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))({n: params[n] for n in "suv"}, jnp.ones((3, 12))))
    assert "[3,20]" in text and "[12,20]" not in text and "[20,12]" not in text


def test_it_counts_what_it_stores_and_multiplies():
    bound, params = made(12, 20, 5)
    assert bound.params == 12 * (12 + 20 + 1) == sum(p.size for p in params.values())
    x = jnp.ones((7, 12))
    cost, dense = bound.cost(7), bound.cost(7, path="dense")
    assert cost.flops == cost.flops_executed == 7 * (2 * 12 * (12 + 20) + 12) == count_flops(bound.matmul, params, x)
    assert dense.flops_executed == count_flops(lambda p, x: x @ bound.materialize(p), params, x)
    assert not bound.may_densify and not parse("sst(rank=5)").candidates((12,), (20,))


def test_rates_do_not_depend_on_the_rank():
    for r in (2, 8):
        leaves = parse(f"sst(rank={r})").bind(16, 64).leaves()
        rates = {name: leaf_multiplier(leaves[name], "linear", 32) for name in "suv"}
        assert rates == pytest.approx({"s": 1.0, "u": 32 / (3 * 16), "v": 32 / (3 * 64)})
        assert not any(leaf.decay for leaf in leaves.values())


def test_rows_of_an_embedding_begin_at_rms_one():
    model = StructuredEmbed(64, 32, structure="sst(rank=4)")
    rows, variables = jax.jit(lambda k: model.init_with_output(k, jnp.arange(64)))(key(0))
    assert np.mean(np.asarray(rows) ** 2) == pytest.approx(1, rel=0.2)
    np.testing.assert_allclose(np.linalg.norm(variables["params"]["u"].value, axis=1), 1, rtol=1e-5)
    assert set(variables["frozen"]) == {"u_rest", "v_rest"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sst()", r"sst needs rank=..."),
        ("sst(rank=0)", "rank must be at least 1, got 0"),
        ("sst(rank=13)", r"rank=13 does not fit a weight of shape \(12, 20\); nearest valid: 7, 8, 9, 10, 11, 12"),
        ("sst(rnk=2)", "did you mean 'rank'"),
        ("sst(rank=2, train=('w',))", "no leaf 'w'"),
    ],
)
def test_bad_arguments(text, said):
    with pytest.raises(StructureError, match=said):
        parse(text).bind(12, 20)
