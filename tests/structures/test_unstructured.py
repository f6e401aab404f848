"""Exactly as many entries as asked for, wherever they are, and what `masked` makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import StructureError, flatten_leaves
from structmat.structures.selection import largest

TEXT = "masked(dense(), unstructured(density=0.25), rule='plain')"


def expected(score, among, count):
    """By a stable sort."""
    order = [i for i in np.argsort(-score.ravel(), kind="stable") if among.ravel()[i]]
    out = np.zeros(score.size, bool)
    out[order[:count]] = True
    return out.reshape(score.shape)


def test_largest_is_a_stable_sort_with_any_ties():
    rng, find = np.random.default_rng(0), jax.jit(jax.vmap(largest, (0, 0, None)))
    ties = rng.integers(0, 4, (20, 6, 7)).astype(np.float32)
    spread = np.abs(rng.normal(size=(20, 6, 7)) * 10.0 ** rng.integers(-30, 30, (20, 6, 7))).astype(np.float32)
    for score in (ties, spread, 0 * ties):
        among = rng.random(score.shape) < 0.8
        most = int(among.sum((1, 2)).min())
        for count in (0, 1, 7, most - 1, most):
            want = np.stack([expected(s, a, count) for s, a in zip(score, among)])
            np.testing.assert_array_equal(find(score, among, count), want)


def test_largest_reads_halves_and_infinities():
    score = jnp.array([1.0, jnp.inf, 2.0, 2.0, 0.0], jnp.bfloat16)
    assert jax.jit(largest)(score, jnp.ones(5, bool), 2).tolist() == [False, True, True, False, False]


@pytest.fixture(scope="module")
def drawn():
    bound = structmat.parse(TEXT).bind(24, 18)
    return bound, jax.jit(jax.vmap(bound.init))(jax.random.split(jax.random.key(0), 400))


def test_masks_have_their_size_and_every_entry_its_chance(drawn):
    _, params = drawn
    mask = np.asarray(params["mask"])
    assert mask.dtype == bool and np.all(mask.sum((1, 2)) == 108)
    share = mask.mean(0)
    assert 0.12 < share.min() and share.max() < 0.38  # six standard errors of 0.25 over 400 draws
    assert np.std(mask.sum(1)) > 1  # columns differ, unlike random_sparse's


def test_masked_entries_have_no_part_in_product_and_gradient(drawn):
    bound, params = drawn
    one = jax.tree.map(lambda a: a[0], params)
    x, mask = np.random.default_rng(1).normal(size=(5, 24)).astype(np.float32), np.asarray(one["mask"])
    w = np.where(mask, one["weights"]["kernel"], 0)
    np.testing.assert_array_equal(bound.materialize(one), w)
    np.testing.assert_allclose(bound.matmul(one, x), x @ w, rtol=1e-5, atol=1e-5)
    loss = lambda kernel: jnp.sum(bound.matmul(one | {"weights": {"kernel": kernel}}, x) ** 2)
    grad = np.asarray(jax.jit(jax.grad(loss))(one["weights"]["kernel"]))
    assert np.all(grad[~mask] == 0) and np.all(grad[mask] != 0)


def test_leaves_and_cost():
    bound = structmat.parse(TEXT).bind(24, 18)
    leaves = dict(flatten_leaves(bound.leaves("embed", "mlp")))
    assert leaves["mask"].axes == leaves["weights/kernel"].axes == ("embed", "mlp")
    assert leaves["mask"].dtype == jnp.bool_ and not leaves["mask"].trainable and leaves["weights/kernel"].trainable
    cost = bound.cost(7)
    assert (cost.params, cost.bits) == (432, 432 * 32 + 432 * 8)
    assert (cost.flops, cost.flops_executed) == (2 * 7 * 108, 2 * 7 * 432)


def test_rescale_gives_outputs_the_size_of_a_dense_layers():
    x = np.random.default_rng(1).normal(size=(64, 200)).astype(np.float32)
    bind = lambda rescale: structmat.parse(f"masked(dense(), unstructured(density=0.05, rescale={rescale}))").bind(
        200, 120
    )
    plain, rescaled = (bind(rescale).leaves()["weights"]["kernel"].std for rescale in (False, True))
    assert plain == pytest.approx(120**0.5 / 200) and rescaled == pytest.approx(plain / 0.05**0.5)
    params = jax.jit(bind(True).init)(jax.random.key(0, impl="unsafe_rbg"))
    y = x @ np.where(params["mask"], params["weights"]["kernel"], 0)
    assert np.std(y) == pytest.approx((120 / 200) ** 0.5, rel=0.1)


def test_projection_keeps_the_largest_entries_also_weighted():
    bound = structmat.parse(TEXT).bind(12, 10)
    w = np.random.default_rng(2).normal(size=(12, 10)).astype(np.float32)
    everywhere = np.ones(w.shape, bool)
    project = jax.jit(lambda w, gram: bound.project(w, in_gram=gram))
    found = project(w, None)
    np.testing.assert_array_equal(found["mask"], expected(np.abs(w), everywhere, 30))
    np.testing.assert_array_equal(found["weights"]["kernel"], w)
    gram = np.linspace(0.01, 4, 12).astype(np.float32) ** 2
    weighted = project(w, gram)
    mask = expected(np.abs(w) * np.sqrt(gram)[:, None], everywhere, 30)
    np.testing.assert_array_equal(weighted["mask"], mask)
    np.testing.assert_array_equal(bound.materialize(weighted), np.where(mask, w, 0))
    assert bound.exact and (weighted["mask"] != found["mask"]).any()


def test_text_fit_and_errors():
    assert structmat.parse(str(structmat.parse(TEXT))) == structmat.parse(TEXT)
    fit = structmat.parse("fit(masked(dense(), unstructured(), rule='plain'), flops=0.3)").bind(10, 10)
    assert fit.structure.pattern.density == 0.3
    for text, message in (
        ("masked(dense(), unstructured(density=0.0))", r"density must be in \(0, 1\], got 0.0"),
        ("masked(dense(), unstructured())", "unstructured needs density="),
        ("masked(dense(), unstructured(density=0.001))", "leaves no entry of 120; smallest density is 0.00833"),
        ("masked(dense(), unstructured(desnity=0.1))", "did you mean 'density'"),
    ):
        with pytest.raises(StructureError, match=message):
            structmat.parse(text).bind(12, 10)
    with pytest.raises(StructureError, match="too large; at most 2147483647"):
        structmat.parse(TEXT).bind(65536, 65536)
    with pytest.raises(StructureError, match=r"a pattern and holds no weights; write masked\(dense\(\), unstruct"):
        structmat.parse("unstructured(density=0.1)").bind(12, 10).leaves()
