"""`Matrix`: a structure with its parameters, at a prompt and under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import Matrix, StructureError
from structmat.structures import random

W = np.random.default_rng(0).normal(size=(12, 18)).astype(np.float32)
TEXTS = ["low_rank(rank=3)", "monarch(blocks=2)", "low_rank(rank=2) + kronecker()", "transpose(tensor_train(rank=2))"]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_products_and_transpose(text):
    m = jax.jit(lambda w: structmat.project(w, text))(W)
    dense = np.asarray(m.materialize())
    x, y = np.ones((5, 12), np.float32), np.ones((2, 3, 18), np.float32)
    for left in (x, jnp.asarray(x), x[0]):
        product = left @ m
        assert isinstance(product, jax.Array), "numpy on the left defers"
        close(product, left @ dense)
    close(y @ m.T, y @ dense.T)
    close(m.T.materialize(), dense.T)
    assert m.T.T.bound == m.bound and m.T.shape == (18, 12) and m.shape == (12, 18)
    assert m.T.params is m.params


def test_is_a_pytree():
    m = structmat.project(W, "low_rank(rank=3)")
    leaves, tree = jax.tree.flatten(m)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).bound == m.bound
    doubled = jax.tree.map(lambda p: 2 * p, m)
    close(doubled.materialize(), 4 * m.materialize())
    close(jax.jit(lambda m, x: x @ m)(m, W.T), W.T @ np.asarray(m.materialize()))
    grad = jax.jit(jax.grad(lambda m: jnp.sum(m.materialize() ** 2)))(m)
    assert isinstance(grad, Matrix) and grad.params["a"].shape == m.params["a"].shape
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), m)
    close(jax.vmap(lambda m: jnp.ones(12) @ m)(stack)[1], 4 * (np.ones(12) @ m))


def test_sums():
    a, b, c = (structmat.project(W, t) for t in ("low_rank(rank=3)", "monarch(blocks=2)", "kronecker()"))
    both = a + b
    close(both.materialize(), a.materialize() + b.materialize())
    assert both.structure == structmat.parse(f"{a.structure} + {b.structure}")
    flat = both + (c + a)
    assert [t.structure.name for t in flat.bound.terms] == ["low_rank", "monarch", "kronecker", "low_rank"]
    close(np.eye(12, dtype=np.float32) @ flat, 2 * a.materialize() + b.materialize() + c.materialize())
    assert flat.cost.params == 2 * a.cost.params + b.cost.params + c.cost.params


def test_says_what_it_is():
    m = structmat.project(W, "low_rank(rank=3)")
    assert repr(m) == "Matrix(low_rank(rank=3), shape=(12, 18), dtype=float32, params=41.7% of dense)"
    assert m.cost == m.bound.cost(1) and m.dtype == jnp.float32
    exact = np.linalg.svd(W, compute_uv=False)
    assert float(m.error(W)) == pytest.approx(np.linalg.norm(exact[3:]) / np.linalg.norm(exact), rel=1e-5)


def test_random_draws_from_the_init():
    m = random("low_rank(rank=3)", 12, 18, jax.random.key(0), jnp.bfloat16)
    assert m.dtype == jnp.bfloat16
    again = m.bound.init(jax.random.key(0), jnp.bfloat16)
    assert all(bool((m.params[n] == again[n]).all()) for n in again)


def test_mixed_sums_have_a_dtype():
    """Index leaves do not count."""
    assert structmat.project(W, "low_rank(rank=1) + random_sparse(density=0.25)").dtype == jnp.float32


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: np.ones((5, 11)) @ m, r"cannot multiply an array of shape \(5, 11\) with a matrix of shape \(12, 18\)"),
        (lambda m: np.float32(3) @ m, "cannot multiply an array of shape"),
        (lambda m: m + m.T, r"cannot add matrices of shapes \(12, 18\) and \(18, 12\)"),
        (lambda m: m.error(W.T), r"cannot project an array of shape \(18, 12\); expected \(12, 18\)"),
        (lambda m: structmat.project(np.ones(3), "dense()"), r"project needs a matrix, got an array of shape \(3,\)"),
        (lambda m: structmat.project(W, "low_rank(rank=13)"), "rank=13 does not fit a weight of shape"),
    ],
)  # fmt: skip
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act(structmat.project(W, "low_rank(rank=3)"))


def test_an_integer_matrix_is_projected_in_floats():
    w = jnp.arange(64).reshape(8, 8)
    assert float(structmat.project(w, "low_rank(rank=2)").error(w)) < 1e-5
