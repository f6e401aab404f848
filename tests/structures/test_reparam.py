"""Reparametrising functions and the wrappers made of them: weight_norm, fake_quantized, dora."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import structmat
from structmat.structures import StructureError, flatten_leaves
from structmat.structures.reparam import fake_quantize, rms_cap, sr_ste, ste

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@functools.cache
def setup(text, n=16, m=24):
    bound = structmat.parse(text).bind(n, m)
    return bound, jax.jit(bound.init)(key(0))


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b))


# -- functions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ste_has_the_hard_value_and_the_soft_gradient(dtype):
    w = jax.random.normal(jax.random.key(0), (9,), dtype)
    hard = jnp.sign(w) * 1e-3
    np.testing.assert_array_equal(jax.jit(ste)(hard, w), hard)
    to_hard, to_soft = jax.grad(lambda h, s: jnp.sum(ste(h, s) * jnp.arange(9.0)), (0, 1))(hard, w)
    np.testing.assert_array_equal(to_soft, jnp.arange(9, dtype=dtype))
    assert not np.any(to_hard)


def test_sr_ste_gradient():
    w = normal(0, 6, 5)
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (6, 5))
    g = normal(2, 6, 5)
    value, back = jax.vjp(lambda w: sr_ste(w, mask, 2e-4), w)
    np.testing.assert_array_equal(value, mask * w)
    np.testing.assert_array_equal(back(g)[0], g + np.float32(2e-4) * (1 - mask) * w)
    dense = jax.grad(lambda w: jnp.vdot(g, sr_ste(w, jnp.ones((6, 5), bool), 2e-4)))(w)
    np.testing.assert_array_equal(dense, g)
    stack = jax.vmap(lambda w: sr_ste(w, mask, 2e-4))(jnp.stack([w, 2 * w]))
    np.testing.assert_array_equal(stack[1], 2 * mask * w)


def test_rms_cap():
    w = normal(0, 40, 30)
    rms = float(jnp.sqrt(jnp.mean(w**2)))
    np.testing.assert_array_equal(rms_cap(w, jnp.ones(()), 2 * rms), w)
    capped = rms_cap(w, jnp.asarray(3.0), rms / 4)
    assert float(jnp.sqrt(jnp.mean(capped**2))) == pytest.approx(3 * rms / 4, rel=1e-5)
    np.testing.assert_allclose(rms_cap(10 * w, jnp.asarray(3.0), rms / 4), capped, rtol=1e-5)
    zero = jax.grad(lambda w: jnp.sum(rms_cap(w, jnp.ones(()), 0.1)))(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(zero, jnp.ones((3, 3)))
    with jax.enable_x64(True):
        wide = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        cap = jax.jit(lambda w, gamma: rms_cap(w, gamma, 0.3))
        check_grads(cap, (wide, jnp.asarray(1.2)), order=1, modes=("rev",))


@pytest.mark.parametrize(("bits", "group"), [(2, 4), (8, 5)])
def test_fake_quantize(bits, group):
    w = normal(bits, 6, 7)
    rounded = jax.jit(lambda w: fake_quantize(w, bits, group))
    q = np.asarray(rounded(w))
    flat, levels = np.asarray(w).ravel(), 2 ** (bits - 1) - 1
    for start in range(0, flat.size, group):
        part, mine = flat[start : start + group], q.ravel()[start : start + group]
        scale = np.abs(part).max() / levels
        np.testing.assert_allclose(mine / scale, np.round(part / scale), atol=1e-3)
        assert np.abs(mine - part).max() <= scale / 2 * 1.0001
    grad = jax.jit(jax.grad(lambda w: jnp.vdot(w, fake_quantize(w, bits, group))))(w)
    np.testing.assert_allclose(grad, q + w, rtol=1e-5, atol=1e-6)
    assert not np.any(rounded(jnp.zeros((6, 7))))


# -- weight_norm -------------------------------------------------------------------------------------------------------


def test_weight_norm_caps_every_trainable_leaf():
    bound, params = setup("weight_norm(frozen(dense()) + block_tensor_train(rank=2) + random_sparse(density=0.25))")
    leaves = dict(flatten_leaves(bound.leaves()))
    gammas = [n for n in leaves if n.startswith("gamma/")]
    assert gammas == ["gamma/1/R", "gamma/1/L", "gamma/2/values"]
    assert all(leaves[n].fixed_rate and not leaves[n].decay and leaves[n].shape == () for n in gammas)
    assert not any(leaf.fixed_rate for n, leaf in leaves.items() if n not in gammas)
    large = jax.tree.map(lambda v: 100 * v if v.dtype == jnp.float32 else v, params["weights"])
    huge = jax.tree.map(lambda v: 10 * v if v.dtype == jnp.float32 else v, large)
    matrix = jax.jit(bound.materialize)
    one, two = (matrix(params | {"weights": w | {"0": params["weights"]["0"]}}) for w in (large, huge))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_weight_norm_starts_at_the_capped_structure():
    bound, params = setup("weight_norm(low_rank(rank=4))", 256, 256)
    inner, _ = setup("low_rank(rank=4)", 256, 256)
    assert all(float(g) == 1 for g in params["gamma"].values())
    assert relative(bound.materialize(params), inner.materialize(params["weights"])) < 0.1
    zero, start = setup("weight_norm(low_rank(rank=4, init='paper'))")
    assert not np.any(zero.materialize(start))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(zero.matmul(p, jnp.ones(16)))))(start)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(grad)) and np.any(grad["weights"]["b"])


@pytest.mark.long
def test_weight_norm_projection_is_that_of_a():
    bound, _ = setup("weight_norm(block_tensor_train(rank=2))")
    inner, _ = setup("block_tensor_train(rank=2)")
    w = 7 * normal(1, 16, 24)
    found = bound.project(w)
    np.testing.assert_allclose(bound.materialize(found), inner.materialize(inner.project(w)), atol=2e-5)
    assert bound.exact and all(float(g) > 1 for g in found["gamma"].values())


# -- fake_quantized ----------------------------------------------------------------------------------------------------


def test_fake_quantized_rounds_every_leaf_but_indices():
    bound, params = setup(
        "fake_quantized(frozen(dense()) + random_sparse(density=0.25, init='paper'), bits=3, group=8)"
    )
    w = bound.effective(params)
    np.testing.assert_array_equal(w["0"]["kernel"], fake_quantize(params["0"]["kernel"], 3, 8))
    np.testing.assert_array_equal(w["1"]["values"], fake_quantize(params["1"]["values"], 3, 8))
    np.testing.assert_array_equal(w["1"]["rows"], params["1"]["rows"])
    fine, values = setup("fake_quantized(dense(), bits=16, group=64)")
    assert relative(fine.materialize(values), values["kernel"]) < 1e-4
    assert fine.cost(1).bits == 16 * 24 * 32  # simulated: counted as it is stored


@pytest.mark.long
def test_fake_quantized_projection_never_loses_to_like():
    bound, params = setup("fake_quantized(low_rank(rank=3), bits=2, group=4)")
    w = bound.materialize(params)
    nearest = jax.jit(lambda w, like: bound.materialize(bound.project(w, like=like)))
    assert relative(nearest(w, None), w) > 0.05
    assert relative(nearest(w, params), w) < 1e-6


# -- dora --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", ["dense()", "low_rank(rank=3)", "frozen(dense()) + low_rank(rank=2, init='paper')"])
def test_dora_starts_at_a(a):
    bound, params = setup(f"dora({a})")
    inner, _ = setup(a)
    v = inner.materialize(params["weights"])
    np.testing.assert_allclose(bound.materialize(params), v, atol=1e-6)
    np.testing.assert_allclose(params["magnitude"], jnp.linalg.norm(v, axis=0), rtol=1e-5)
    w = bound.materialize(params | {"magnitude": jnp.arange(24.0)})
    np.testing.assert_allclose(jnp.linalg.norm(w, axis=0), jnp.arange(24.0), rtol=1e-5)
    scaled = jax.tree.map(lambda x: 2 * x, params["weights"]) | {}
    np.testing.assert_allclose(bound.materialize(params | {"weights": scaled}), v, atol=1e-6)


def test_dora_gradient_is_orthogonal_to_the_direction():
    """Scaling a column of V changes nothing, so the gradient with respect to V has no component along it."""
    with jax.enable_x64(True):
        bound = structmat.parse("dora(dense())").bind(8, 5)
        params = bound.init(key(0), jnp.float64)
        g = normal(1, 8, 5)
        grad = jax.jit(jax.grad(lambda p: jnp.vdot(g, bound.materialize(p))))(params)
        v = params["weights"]["kernel"]
        np.testing.assert_allclose(jnp.sum(grad["weights"]["kernel"] * v, axis=0), 0, atol=1e-12)
        unit = v / jnp.linalg.norm(v, axis=0)
        np.testing.assert_allclose(grad["magnitude"], jnp.sum(g * unit, axis=0), atol=1e-12)
        dead = {"weights": {"kernel": v.at[:, 2].set(0)}, "magnitude": params["magnitude"]}
        grad = jax.grad(lambda p: jnp.vdot(g, bound.materialize(p)))(dead)
        assert np.all(np.isfinite(grad["weights"]["kernel"])) and not np.any(bound.materialize(dead)[:, 2])


def test_dora_keeps_no_dense_matrix_for_the_backward_pass():
    bound, params = setup("dora(low_rank(rank=3))", 96, 80)
    _, back = jax.vjp(bound.matmul, params, jnp.ones((5, 96)))
    assert not {(96, 80), (80, 96)} & {v.shape for v in jax.tree.leaves(back)}


def test_dora_projection_refits_magnitudes():
    inner, _ = setup("kronecker()")
    bound, params = setup("dora(kronecker())")
    w = normal(2, 16, 24)
    before, after = inner.materialize(inner.project(w)), bound.materialize(bound.project(w))
    assert relative(after, w) < 0.99 * relative(before, w)
    member = bound.materialize(params)
    assert relative(bound.materialize(bound.project(member, like=params)), member) < 1e-6
    assert not bound.exact and setup("dora(dense())")[0].exact


@pytest.mark.long
@pytest.mark.parametrize("a", ["block_tensor_train(rank=1, cores=3)", "low_rank(rank=2)"])
def test_dora_refit_is_least_squares_in_the_weighted_norm(a):
    bound, _ = setup(f"dora({a})", 16, 16)
    w = normal(2, 16, 16)
    gram = jnp.linspace(0.1, 5, 16) if "block" in a else jnp.cov(normal(3, 16, 40))
    full = gram if gram.ndim == 2 else jnp.diag(gram)
    params = jax.jit(lambda w, gram: bound.project(w, in_gram=gram))(w, gram)

    def error(m):
        d = w - bound.materialize(params | {"magnitude": m})
        return jnp.vdot(d, full @ d)

    value, slope = jax.value_and_grad(error)(params["magnitude"])
    assert float(jnp.abs(slope).max()) < 1e-4 * float(value)


def test_dora_cost_includes_its_norms():
    cost = setup("dora(low_rank(rank=3))")[0].cost(5)
    assert cost.params == 3 * 40 + 24 and cost.flops == 2 * 5 * 3 * 40 + 5 * 24
    assert cost.flops_executed == cost.flops + 2 * 16 * 24 * 3 + 3 * 16 * 24


# -- text, fit and errors ----------------------------------------------------------------------------------------------


def test_fit_reaches_through_the_wrappers():
    for text in ("weight_norm(low_rank())", "fake_quantized(low_rank(), bits=4)", "dora(low_rank())"):
        bound = structmat.parse(f"fit({text}, params=0.5)").bind(64, 64)
        assert 0.46 < bound.params / 4096 <= 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fake_quantized(dense(), bits=1)", "bits must be at least 2, got 1"),
        ("fake_quantized(dense(), group=0)", "group must be at least 1, got 0"),
        ("dora()", "needs a"),
        ("weight_nrm(dense())", "did you mean 'weight_norm'"),
        ("weight_norm(dense(), init='paper')", "set init on the parts"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        structmat.parse(text).bind(16, 24)
