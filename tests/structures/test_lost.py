"""LOST: what its two branches start from, what it computes, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.structures import StructureError, parse
from structmat.training.config import default, validate

N, M, R = 24, 20, 5


def made(text, key=0):
    bound = parse(text).bind(N, M)
    return bound, bound.init(jax.random.key(key))


def dense_of(key=0):
    """The matrix the structure is cut from: everything kept, nothing scaled away."""
    _, whole = made(f"lost(rank={M}, density=1.0, gamma=0.5, activation='identity')", key)
    return np.asarray(whole["values"])


def test_with_all_channels_of_the_remainder_it_is_the_dense_matrix():
    bound, params = made(f"lost(rank={R}, density=1.0, gamma=0.5, activation='identity', values='residual')")
    x = jax.random.normal(jax.random.key(1), (3, N))
    np.testing.assert_allclose(2 * bound.matmul(params, x), x @ dense_of(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(2 * bound.materialize(params), dense_of(), rtol=1e-4, atol=1e-5)


def test_channels_are_those_of_largest_remainder():
    _, params = made(f"lost(rank={R}, density=0.25)")
    u, s, vt = np.linalg.svd(dense_of())
    low = (u[:, :R] * s[:R]) @ vt[:R]
    np.testing.assert_allclose(params["a"].T @ params["b"], low, atol=1e-5)
    rest = dense_of() - low
    assert np.sum(rest**2) == pytest.approx(np.sum(s[R:] ** 2), rel=1e-4)
    want = np.sort(np.argsort(-np.linalg.norm(rest, axis=1))[:6])
    np.testing.assert_array_equal(params["index"], want)
    np.testing.assert_allclose(params["values"], dense_of()[want], atol=1e-6)
    np.testing.assert_allclose(
        made(f"lost(rank={R}, density=0.25, values='residual')")[1]["values"], rest[want], atol=1e-5
    )
    other = made(f"lost(rank={R}, density=0.25, channels='random')")[1]["index"]
    assert list(other) != list(want) and len(set(other.tolist())) == 6
    np.testing.assert_array_equal(made(f"lost(rank={R}, density=0.25)")[1]["index"], want)


def test_values_and_gradients():
    bound, params = made(f"lost(rank={R}, density=0.25, gamma=0.9)")
    x = jax.random.normal(jax.random.key(1), (7, N))
    want = 0.9 * jax.nn.silu(x @ params["a"].T) @ params["b"] + 0.1 * x[:, params["index"]] @ params["values"]
    np.testing.assert_allclose(bound.matmul(params, x), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        bound.take(params, jnp.arange(N)), bound.matmul(params, jnp.eye(N)), rtol=1e-5, atol=1e-6
    )
    dy = jax.random.normal(jax.random.key(2), (7, M))
    free = {n: p for n, p in params.items() if n != "index"}
    grads = jax.grad(lambda p: jnp.sum(dy * bound.matmul({**p, "index": params["index"]}, x)))(free)
    np.testing.assert_allclose(grads["values"], 0.1 * (x.T @ dy)[params["index"]], rtol=1e-5, atol=1e-5)


def test_it_counts_what_it_stores_and_multiplies():
    bound, _ = made(f"lost(rank={R}, density=0.25)")
    assert bound.params == R * (N + M) + 6 * M and bound.cost(3).flops == 2 * 3 * bound.params
    assert bound.cost(1).bits == 32 * (bound.params + 6)
    found = parse("fit(lost(density=0.125), params=0.5)").bind(N, M).structure
    assert found.rank == (0.5 * N * M - 3 * M) // (N + M)


def test_starts_at_nothing_and_starts_at_random():
    bound = parse(f"lost(rank={R}, density=0.25)").bind(N, M)
    zero = bound.init(jax.random.key(0), gain=0.0)
    assert not np.any(bound.matmul(zero, jnp.ones((2, N)))) and np.any(zero["a"])
    assert bound.leaves(gain=0.5)["b"].std == pytest.approx(0.5 * bound.leaves()["b"].std)
    random = made(f"lost(rank={R}, density=0.25, factors='random')")[1]
    fixed = made(f"lost(rank={R}, density=0.25)")[1]
    assert not np.allclose(random["a"], fixed["a"]) and np.array_equal(random["index"], fixed["index"])
    assert jax.eval_shape(bound.init, jax.random.key(0))["index"].dtype == jnp.int32


def test_it_is_no_matrix_unless_the_activation_is_the_identity():
    bound, params = made(f"lost(rank={R}, density=0.25)")
    for call in (lambda: bound.materialize(params), lambda: bound.rmatmul(params, jnp.ones((1, M)))):
        with pytest.raises(StructureError, match="not a matrix"):
            call()
    with pytest.raises(StructureError, match="low_rank"):
        bound.project(jnp.ones((N, M)))
    linear, held = made(f"lost(rank={R}, density=0.25, activation='identity')")
    x = jax.random.normal(jax.random.key(1), (3, N))
    np.testing.assert_allclose(linear.matmul(held, x), x @ linear.materialize(held), rtol=1e-4, atol=1e-6)
    y = jax.random.normal(jax.random.key(1), (3, M))
    np.testing.assert_allclose(linear.rmatmul(held, y), y @ linear.materialize(held).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lost(rank=4)", "density"),
        ("lost(rank=30, density=0.5)", "rank=30"),
        ("lost(rank=4, density=0.01)", "smallest density"),
        ("lost(rank=4, density=0.5, gamma=1.0)", "gamma"),
        ("lost(rank=4, density=0.5, channels='nrom')", "norm"),
    ],
)
def test_bad_arguments(text, said):
    with pytest.raises(StructureError, match=said):
        parse(text).bind(N, M)


def test_a_scanned_model_takes_it():
    config = default("lm")
    config.structure = "fit(lost(density=0.0625), params=0.4)"
    config.model.update(layers=2, width=32, heads=2)
    config.mup.base_width = 32
    task = validate(config)
    variables = jax.eval_shape(task.model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert any("index" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables["frozen"]))
