"""Masked weights: which mask, which gradient, what projection keeps and what cost says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import StructureError, flatten_leaves
from tests.marks import mostly_long

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


NM = "masked(dense(), n_m_sparse(2, 4), rule='{}', decay=0.01)"
RANDOM = "masked(dense(), random_sparse(density=0.25), rule='{}', decay=0.01)"
MAGNITUDE = "masked(dense(), random_sparse(density=0.25, select='magnitude'), rule='{}', decay=0.01)"


@functools.cache
def setup(text, n=12, m=10):
    bound = structmat.parse(text).bind(n, m)
    return bound, jax.jit(bound.init)(key(0))


@pytest.mark.parametrize("text", mostly_long([NM, RANDOM, MAGNITUDE], [RANDOM]))
def test_gradient_of_each_rule(text):
    """Exactly g at the masked weights, dense; plus decay (1 - mask) w; or masked: for loss x -> <g, W>."""
    g = normal(1, 12, 10)
    found = {}
    for rule in ("ste", "sr_ste", "plain"):
        bound, params = setup(text.format(rule))
        w = bound.materialize(params)
        kernel, mask = np.asarray(params["weights"]["kernel"]), np.asarray(w != 0)
        np.testing.assert_array_equal(w, np.where(mask, kernel, 0))
        grad = jax.grad(lambda p, b=bound: jnp.vdot(g, b.materialize(p)), allow_int=True)(params)
        found[rule] = np.asarray(grad["weights"]["kernel"])
        assert "rows" not in grad or grad["rows"].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(found["ste"], g)
    np.testing.assert_array_equal(found["sr_ste"], g + np.float32(0.01) * np.where(mask, 0, kernel))
    np.testing.assert_array_equal(found["plain"], np.where(mask, g, 0))


def test_gradient_is_taken_at_the_masked_weights():
    bound, params = setup(NM.format("sr_ste"))
    x, target = normal(2, 5, 12), jnp.ones((5, 10))
    loss = lambda w: jnp.sum((x @ w - target) ** 2)
    w = bound.materialize(params)
    expected = jax.grad(loss)(w) + 0.01 * jnp.where(w != 0, 0, params["weights"]["kernel"])
    grad = jax.grad(lambda p: jnp.sum((bound.matmul(p, x) - target) ** 2))(params)
    np.testing.assert_allclose(grad["weights"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    assert np.any(np.abs(grad["weights"]["kernel"] - jax.grad(loss)(params["weights"]["kernel"])) > 0.1)


def test_mask_follows_the_weights_unless_it_is_drawn():
    for text, follows in ((NM, True), (MAGNITUDE, True), (RANDOM, False)):
        bound, params = setup(text.format("sr_ste"))
        support = np.asarray(bound.materialize(params) != 0)
        grown = jnp.where(support, 0.5, 1.0) * jnp.ones((12, 10))
        moved = np.asarray(bound.materialize(params | {"weights": {"kernel": grown}}) != 0)
        assert np.array_equal(moved, support) != follows
        assert ("rows" in params) != follows
    leaves = dict(flatten_leaves(setup(RANDOM.format("ste"))[0].leaves("embed", "mlp")))
    assert not leaves["rows"].trainable and leaves["rows"].axes == ("mlp", None) and leaves["weights/kernel"].trainable


def test_exact_pattern_at_every_weight():
    bound, params = setup("masked(low_rank(rank=2), n_m_sparse(1, 4, axis='out'))", 12, 16)
    w = np.asarray(bound.materialize(params)).reshape(12, 4, 4)
    assert np.all(np.sum(w != 0, axis=-1) == 1)
    tied = setup(NM.format("ste"))[0].materialize({"weights": {"kernel": jnp.ones((12, 10))}})
    assert np.all(np.sum(np.asarray(tied).T.reshape(10, 3, 4), axis=-1) == 2)


@pytest.mark.parametrize("text", [NM, MAGNITUDE])
def test_projection_is_the_patterns_and_keeps_the_masked_entries(text):
    bound, _ = setup(text.format("sr_ste"))
    w = normal(3, 12, 10)
    found = bound.project(w)
    np.testing.assert_array_equal(found["weights"]["kernel"], w)
    pattern = bound.structure.pattern.bind(12, 10)
    np.testing.assert_array_equal(bound.materialize(found), pattern.materialize(pattern.project(w)))
    gram = jnp.linspace(0.01, 4, 12) ** 2
    weighted = bound.materialize(bound.project(w, in_gram=gram))
    np.testing.assert_array_equal(weighted, pattern.materialize(pattern.project(w, in_gram=gram)))
    assert np.any(weighted != bound.materialize(found)) and bound.exact


def test_projection_never_loses_to_like():
    bound, params = setup("masked(low_rank(rank=2), random_sparse(density=0.5))")
    w = bound.materialize(params)
    again = bound.project(w, like=params)
    assert float(jnp.linalg.norm(bound.materialize(again) - w)) == 0
    np.testing.assert_array_equal(again["rows"], params["rows"])
    with pytest.raises(StructureError, match="no closed form with in_gram"):
        bound.project(w, like=params, in_gram=jnp.ones(12))
    with pytest.raises(StructureError, match="needs key="):
        bound.project(w)
    assert not bound.exact


def test_cost_says_that_it_is_simulated():
    bound, _ = setup(NM.format("sr_ste"))
    for path in ("factored", "dense"):
        cost = bound.cost(7, path=path)
        assert (cost.params, cost.bits) == (120, 120 * 32)
        assert (cost.flops, cost.flops_executed) == (2 * 7 * 60, 2 * 7 * 120)
    assert setup(RANDOM.format("ste"))[0].cost(1).bits == 120 * 32 + 30 * 32
    over, _ = setup("masked(low_rank(rank=2), random_sparse(density=0.25))")
    assert over.cost(7).flops == 2 * 120 * 2 + 2 * 7 * 30 and over.cost(7).flops_executed == 2 * 120 * 2 + 2 * 7 * 120


def test_combines_with_freezing_transposing_and_fit():
    bound, params = setup(f"frozen({RANDOM.format('ste')})")
    assert not any(leaf.trainable for _, leaf in flatten_leaves(bound.leaves()))
    np.testing.assert_array_equal(bound.transpose().materialize(params), bound.materialize(params).T)
    fit = structmat.parse("fit(masked(dense(), n_m_sparse(m=8)), flops=0.5)").bind(16, 16)
    assert fit.structure.pattern.n == 4
    fit = structmat.parse("fit(masked(low_rank(), n_m_sparse(2, 4)), params=0.5)").bind(16, 16)
    assert fit.structure.a.rank == 4
    text = "masked(dense(), n_m_sparse(2, 4), rule='ste')"
    assert structmat.parse(text).short() == "masked(dense(), n_m_sparse(n=2, m=4), rule='ste')"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "masked(dense(), low_rank(rank=2))",
            r"pattern must be unstructured.*, n_m_sparse\(...\), random_sparse.* or channel_sparse\(...\), got low_rank",
        ),
        ("masked(dense())", "needs pattern"),
        ("masked(dense(), n_m_sparse(2, 4), rule='srste')", "did you mean 'sr_ste'"),
        ("masked(dense(), n_m_sparse(2, 4), decay=-1.0)", "decay must not be negative, got -1"),
        ("masked(dense(), n_m_sparse(2, 5))", "m=5 does not fit"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        structmat.parse(text).bind(12, 10)
