"""The dense matrix is formed for each product and never kept for the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import choose_path
from structmat.structures import parse
from tests.marks import mostly_long

SLTRAIN = "low_rank(rank=4) + random_sparse(density=0.1)"


def made(text, n=24, m=40):
    bound = parse(text).bind(n, m)
    return bound, bound.init(jax.random.key(0))


@pytest.mark.parametrize("text", mostly_long([SLTRAIN, "low_rank(rank=4)", "monarch(blocks=2)"], ["low_rank(rank=4)"]))
def test_it_is_the_same_matrix_with_the_same_gradients(text):
    (plain, params), (bound, same) = made(text), made(f"rebuilt({text})")
    jax.tree.map(np.testing.assert_array_equal, params, same)
    x, dy = (jax.random.normal(jax.random.key(i), (7, n)) for i, n in ((1, 24), (2, 40)))
    free, fixed = (
        jax.tree.map(lambda p, keep=keep: p if jnp.issubdtype(p.dtype, jnp.integer) != keep else None, params)
        for keep in (True, False)
    )
    whole = lambda p: jax.tree.map(lambda a, b: b if a is None else a, p, fixed, is_leaf=lambda a: a is None)
    of = lambda bound: jax.value_and_grad(lambda p, x: jnp.sum(dy * bound.matmul(whole(p), x)), argnums=(0, 1))(free, x)
    for got, want in zip(jax.tree.leaves(of(bound)), jax.tree.leaves(of(plain))):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bound.rmatmul(params, dy), dy @ plain.materialize(params).T, rtol=1e-4, atol=1e-5)


def sizes(bound, params):
    """Shapes of what lives between the passes."""
    free, build = jax.tree.flatten(params)
    real = [i for i, a in enumerate(free) if jnp.issubdtype(a.dtype, jnp.floating)]

    def loss(values, x):
        held = list(free)
        for i, value in zip(real, values):
            held[i] = value
        return jnp.sum(jnp.square(bound.matmul(jax.tree.unflatten(build, held), x)))

    _, back = jax.vjp(loss, [free[i] for i in real], jnp.ones((7, 24)))
    return {a.shape for a in jax.tree.leaves(back)}


def test_what_is_kept_has_no_dense_matrix():
    bound, params = made(f"rebuilt({SLTRAIN})")
    assert (24, 40) not in sizes(bound, params) and (40, 24) not in sizes(bound, params)

    class Keeping(type(bound)):
        def matmul(self, params, x):
            return x @ self._dense(params, x)

    keeping = Keeping(bound.structure, bound.in_shape, bound.out_shape, bound.inner)
    assert (24, 40) in sizes(keeping, params)  # what the same product keeps without it


def test_it_counts_a_gemm_and_the_parameters_of_what_it_rebuilds():
    (plain, _), (bound, _) = made(SLTRAIN), made(f"rebuilt({SLTRAIN})")
    assert bound.params == plain.params and bound.cost(1).bits == plain.cost(1).bits
    assert bound.cost(100).flops == 2 * 100 * 24 * 40 + plain._materialize_flops()
    assert choose_path(bound, 1)[0] == choose_path(bound, 10**6)[0] == "factored"
    found = parse("fit(rebuilt(low_rank()), params=0.5)").bind(24, 40).structure
    assert found == parse("rebuilt(low_rank(rank=7))")
