"""Random sparse and N:M: supports, projections, gradients and what the backward pass keeps; SLTrain's facts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import StructureError, map_leaves
from structmat.structures.random_sparse import draw_rows
from tests.marks import thinned

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


SLTRAIN = "low_rank(rank=4, init='paper') + random_sparse(density=0.1, init='paper')"


def bind(text, n, m):
    return structmat.parse(text).bind(n, m)


@functools.cache
def setup(text, n, m):
    bound = bind(text, n, m)
    return bound, jax.jit(bound.init)(key(0))


# -- the support -----------------------------------------------------------------------------------------------------


def test_rows_are_distinct_ascending_and_even():
    _, params = setup("random_sparse(density=0.1)", 50, 400)
    rows = np.asarray(params["rows"])
    assert rows.shape == (400, 5) and rows.dtype == np.int32 and params["values"].dtype == np.float32
    assert np.all(np.diff(rows, axis=1) > 0) and rows.min() >= 0 and rows.max() < 50
    counts = np.bincount(rows.ravel(), minlength=50)
    assert np.sum((counts - 40) ** 2 / 40) < 90  # chi-square, 49 degrees of freedom: p < 0.0003
    assert len({tuple(r) for r in rows}) > 395


def test_a_column_depends_on_the_key_and_its_place_alone():
    draw = jax.jit(draw_rows, static_argnums=(1, 2, 3))
    few = draw(jax.random.key(3), 8, 30, 6)
    np.testing.assert_array_equal(draw(jax.random.key(3), 40, 30, 6)[:8], few)
    assert np.any(draw(jax.random.key(4), 8, 30, 6) != few)


@pytest.mark.parametrize(("axis", "n", "m"), [("in", 24, 10), ("out", 10, 24)])
def test_every_group_holds_exactly_n(axis, n, m):
    bound, params = setup(f"n_m_sparse(3, 8, axis='{axis}')", n, m)
    groups = lambda w: np.asarray(w if axis == "out" else w.T).reshape(-1, 8)
    assert np.all(np.sum(groups(bound.materialize(params)) != 0, axis=1) == 3)
    assert np.all(np.diff(params["positions"], axis=-1) > 0) and params["positions"].dtype == np.int32
    for w in (
        normal(0, n, m),
        jnp.zeros((n, m)),
        jnp.ones((n, m)),
        jax.random.normal(jax.random.key(1), (n, m), jnp.bfloat16),
        jnp.round(normal(2, n, m)),
    ):
        assert np.all(np.sum(groups(bound.mask(w, {})), axis=1) == 3)


# -- projection ------------------------------------------------------------------------------------------------------


def best_by_hand(w, score, groups, keep):
    """w with the `keep` best scores of each group (a list of flat index arrays), the rest zero."""
    flat, out = np.ravel(w), np.zeros(w.size)
    for group in groups:
        chosen = group[np.argsort(-np.ravel(score)[group], kind="stable")[:keep]]
        out[chosen] = flat[chosen]
    return out.reshape(w.shape)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("random_sparse(density=0.25, select='magnitude')", 6),
        ("n_m_sparse(2, 6)", 2),
        ("n_m_sparse(1, 4, axis='out')", 1),
    ],
)
def test_projection_keeps_the_largest(text, keep):
    bound = bind(text, 24, 16)
    rng = np.random.default_rng(1)
    w, a, b = rng.normal(size=(24, 16)), rng.uniform(0.1, 9, 24), rng.uniform(0.1, 9, 16)
    index = np.arange(24 * 16).reshape(24, 16)
    if text.startswith("random"):
        groups = list(index.T)
    else:
        groups = index.T.reshape(-1, 6) if "'out'" not in text else index.reshape(-1, 4)
    with jax.enable_x64(True):
        found = bound.materialize(bound.project(jnp.asarray(w)))
        np.testing.assert_array_equal(found, best_by_hand(w, np.abs(w), groups, keep))
        weighted = bound.materialize(bound.project(jnp.asarray(w), in_gram=jnp.asarray(a), out_gram=jnp.asarray(b)))
        score = np.abs(w) * np.sqrt(a)[:, None] * np.sqrt(b)
        np.testing.assert_array_equal(weighted, best_by_hand(w, score, groups, keep))
        assert np.any(weighted != found)
    with pytest.raises(StructureError, match="full in_gram"):
        bound.project(jnp.asarray(w), in_gram=jnp.eye(24))


def test_random_projection_takes_the_entries_of_its_support():
    bound, params = setup("random_sparse(density=0.25)", 24, 16)
    w = normal(5, 24, 16)
    kept = bound.project(w, like=params)
    np.testing.assert_array_equal(kept["rows"], params["rows"])
    support = bound.materialize(params) != 0
    np.testing.assert_array_equal(bound.materialize(kept), np.where(support, w, 0))
    weighted = bound.project(w, like=params, in_gram=jnp.arange(24.0))
    np.testing.assert_array_equal(weighted["values"], kept["values"])
    drawn = bound.project(w, key=jax.random.key(6))
    assert np.any(drawn["rows"] != params["rows"]) and not bound.exact
    with pytest.raises(StructureError, match="needs key="):
        bound.project(w)


def test_sum_projection_keeps_the_support_and_lowers_the_error():
    bound, params = setup(SLTRAIN, 40, 32)
    w = normal(7, 40, 32) / 6
    found = jax.jit(lambda w: bound.project(w, like=params))(w)
    np.testing.assert_array_equal(found["1"]["rows"], params["1"]["rows"])
    low = bound.terms[0]
    alone = jnp.linalg.norm(w - low.materialize(low.project(w)))
    assert jnp.linalg.norm(w - bound.materialize(found)) < 0.97 * alone


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", thinned([SLTRAIN, "random_sparse(density=0.1)", "n_m_sparse(1, 8)"], 2))
def test_gradients_equal_autodiff_through_scatter(text):
    """In double precision, against a dense matrix built by `.at[].add` here."""
    with jax.enable_x64(True):
        bound = bind(text, 40, 30)
        params = bound.init(key(0), jnp.float64)
        x, g = normal(1, 7, 40), normal(2, 7, 30)
        sparse = params["1"] if "1" in params else params
        groups = jnp.arange(0, 40, 8)[:, None]
        rows = sparse["rows"] if "rows" in sparse else (groups + sparse["positions"]).reshape(30, -1)

        def scattered(p):
            values = (p["1"] if "1" in p else p)["values"].reshape(30, -1)
            w = jnp.zeros((40, 30)).at[rows, jnp.arange(30)[:, None]].add(values)
            return w + p["0"]["a"].T @ p["0"]["b"] if "0" in p else w

        one = jax.jit(jax.grad(lambda p, x: jnp.vdot(g, bound.matmul(p, x)), (0, 1), allow_int=True))(params, x)
        two = jax.jit(jax.grad(lambda p, x: jnp.vdot(g, x @ scattered(p)), (0, 1), allow_int=True))(params, x)
        index = one[0]["1"] if "1" in one[0] else one[0]
        assert index["rows" if "rows" in index else "positions"].dtype == jax.dtypes.float0
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
            if a.dtype != jax.dtypes.float0:
                np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "side"),
    thinned(
        [(t, s) for t in (SLTRAIN, "random_sparse(density=0.05)", "n_m_sparse(2, 4)") for s in ("rmatmul", "matmul")], 3
    ),
)
def test_the_backward_pass_keeps_no_dense_matrix_and_no_copies_of_the_input(text, side):
    bound, params = setup(text, 96, 80)
    x = jnp.ones((5, 96 if side == "matmul" else 80))
    _, back = jax.vjp(lambda p, x: getattr(bound, side)(p, x), params, x)
    kept = [v.shape for v in jax.tree.leaves(back)]
    assert kept and (96, 80) not in kept and (80, 96) not in kept
    total = sum(int(np.prod(s)) for s in kept)
    assert total <= 2 * (sum(p.size for p in jax.tree.leaves(params)) + x.size)
    w = lambda p: bound.materialize(p) if side == "matmul" else bound.materialize(p).T
    dense = [v.shape for v in jax.tree.leaves(jax.vjp(lambda p, x: x @ w(p), params, x)[1])]
    assert (96, 80) in dense or (80, 96) in dense  # the check can fail


def test_forward_pass_of_random_sparse_forms_no_dense_matrix():
    bound, params = setup("random_sparse(density=0.05)", 96, 80)
    jaxpr = str(jax.make_jaxpr(bound.matmul)(params, jnp.ones((5, 96))))
    assert "[96,80]" not in jaxpr and "[80,96]" not in jaxpr
    assert "[80,96]" in str(jax.make_jaxpr(bound.materialize)(params))


def test_accumulates_in_single_precision():
    bound = bind("random_sparse(density=1.0)", 2048, 1)
    params = {"values": jnp.ones((1, 2048), jnp.bfloat16), "rows": jnp.arange(2048, dtype=jnp.int32)[None]}
    y = bound.matmul(params, jnp.ones((1, 2048), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 2048  # bf16 sums of ones stop at 256


# -- SLTrain ---------------------------------------------------------------------------------------------------------


def test_sltrain_starts_at_its_sparse_term():
    bound, params = setup(SLTRAIN, 200, 128)
    np.testing.assert_array_equal(bound.materialize(params), bound.terms[1].materialize(params["1"]))
    values = np.asarray(params["1"]["values"])
    assert np.abs(values).max() <= 200**-0.5 and values.std() == pytest.approx((3 * 200) ** -0.5, rel=0.05)
    assert np.abs(params["0"]["a"]).max() <= 200**-0.5 and not np.any(params["0"]["b"])
    grad = jax.grad(lambda p: jnp.sum(bound.matmul(p, jnp.ones((3, 200))) ** 2), allow_int=True)(params)
    assert np.any(grad["0"]["b"]) and not np.any(grad["0"]["a"]) and np.any(grad["1"]["values"])
    moved = params | {"0": params["0"] | {"b": normal(0, 4, 128)}}
    low = bound.terms[0].materialize(moved["0"])
    assert np.linalg.matrix_rank(low) == 4 and np.linalg.matrix_rank(bound.materialize(moved)) == 128


LLAMA = {  # (width, feed-forward, layers, rank) and millions of parameters: full, low rank, SLTrain
    "60M": ((512, 1376, 8, 128), (58.1, 42.8, 43.5)),
    "130M": ((768, 2048, 12, 256), (134.1, 94.0, 96.5)),
    "350M": ((1024, 2736, 24, 256), (368, 185, 194.3)),
    "1B": ((2048, 5461, 24, 512), (1339, 609, 645.5)),
}


@pytest.mark.parametrize("size", LLAMA)
def test_parameter_counts_of_the_paper(size):
    (d, ff, layers, rank), expected = LLAMA[size]
    sites = [(d, d)] * 4 + [(d, ff)] * 2 + [(ff, d)]
    texts = ["dense()", f"low_rank(rank={rank})", f"low_rank(rank={rank}) + random_sparse(density=0.03)"]
    for text, millions in zip(texts, expected):
        structure = structmat.parse(text)
        inside = sum(structure.bind(*site).params for site in sites) + 2 * d
        total = 2 * 32000 * d + layers * inside + d
        assert total / 1e6 == pytest.approx(millions, rel=1.5e-3), text


# -- accounting, sizes and errors ------------------------------------------------------------------------------------


def test_cost_counts_entries_and_index_bits():
    sparse = bind("random_sparse(density=0.1)", 100, 40).cost(7)
    assert (sparse.params, sparse.bits, sparse.flops) == (400, 400 * 64, 2 * 7 * 400)
    assert sparse.flops_executed == sparse.flops
    groups = bind("n_m_sparse(1, 4)", 100, 40).cost(7)
    assert (groups.params, groups.bits, groups.flops) == (1000, 1000 * 64, 2 * 7 * 1000)
    assert groups.flops_executed == 2 * 7 * 4000  # it materialises, and says so


def test_fans():
    fans = lambda text, n, m: (lambda leaf: (leaf.fan_in, leaf.fan_out))(bind(text, n, m).leaves()["values"])
    assert fans("random_sparse(density=0.1)", 100, 40) == (10, 4)
    assert fans("random_sparse(density=0.01)", 100, 40) == (1, 1)
    assert fans("n_m_sparse(2, 8)", 96, 32) == fans("n_m_sparse(2, 8, axis='out')", 96, 32) == (24, 8)


def test_fit_counts_values_only():
    bound = bind("fit(random_sparse(), params=0.25)", 64, 24)
    assert bound.count == 16 and bound.params == 0.25 * 64 * 24
    assert bind("fit(n_m_sparse(m=16), params=0.2)", 64, 24).structure.n == 3
    assert bind("fit(low_rank(rank=2) + random_sparse(), bits=0.5)", 64, 24).cost(1).bits <= 0.5 * 64 * 24 * 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random_sparse(density=0)", r"density must be in \(0, 1\], got 0"),
        ("random_sparse(density=1.5)", r"density must be in \(0, 1\], got 1.5"),
        ("random_sparse(density=0.001)", "no entry in a column of 24; smallest density is 0.0416667"),
        ("random_sparse()", "needs density"),
        ("random_sparse(density=0.1, select='magnitud')", "did you mean 'magnitude'"),
        ("n_m_sparse(5, 4)", "n must be at most m=4, got 5"),
        ("n_m_sparse(2, 5)", "m=5 does not fit .* nearest valid: .*4, 6"),
        ("n_m_sparse(2, 5, axis='out')", "nearest valid: .*4, 8"),
        ("n_m_sparse(m=4)", "needs n"),
        ("n_m_sparse(0, 4)", "n must be at least 1, got 0"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        bind(text, 24, 16)


def test_index_leaves_do_not_train():
    for text in ("random_sparse(density=0.2)", "n_m_sparse(1, 2)"):
        flags = map_leaves(lambda leaf: (leaf.trainable, leaf.decay), bind(text, 20, 10).leaves())
        assert flags.pop("values") == (True, True) and set(flags.values()) == {(False, False)}


def test_support_does_not_depend_on_the_precision_switch():
    bound, key = structmat.parse("random_sparse(density=0.25)").bind(24, 6), jax.random.key(0)
    narrow = np.asarray(bound.init(key)["rows"])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(bound.init(key)["rows"], narrow)
