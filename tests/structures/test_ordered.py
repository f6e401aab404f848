"""Ordered low rank: what acts, what it starts from, which components matter, which go first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.structures import StructureError, parse
from structmat.structures.ordered import importance, tail_norms
from structmat.structures.ordered_cut import cut_widths

N, M = 12, 9


def made():
    """A Bound, and arrays of it with every component acting."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(M, size)).astype(np.float32) for name, size in (("a", N), ("b", M))}
    return parse("ordered()").bind(N, M), arrays


def test_starts_as_the_dense_draw_with_singular_values_shared_evenly():
    bounds = [parse(text).bind(N, M) for text in ("ordered()", "ordered(rank=4)")]

    @jax.jit
    def results(key):
        held = [bound.init(key) for bound in bounds]
        return held[0], [bound.materialize(own) for bound, own in zip(bounds, held)], jax.random.normal(key, (N, M))

    params, found, drawn = jax.device_get(results(jax.random.key(0)))
    dense = drawn * M**0.5 / N
    u, s, vt = np.linalg.svd(dense)
    assert params["width"] == bounds[0].structure.rank == M
    np.testing.assert_allclose(found[0], dense, atol=1e-5)
    for name in ("a", "b"):
        np.testing.assert_allclose(params[name] @ params[name].T, np.diag(s), atol=1e-5)
    np.testing.assert_allclose(found[1], (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)


def test_only_the_first_components_act_and_learn():
    bound, params = made()
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(5, size)).astype(np.float32) for size in (N, M))

    @jax.jit
    def results(width):
        own = {**params, "width": width}
        loss = lambda free: jnp.sum(y * jnp.sin(bound.matmul({**own, **free}, x)))
        grads = jax.grad(loss)({"a": params["a"], "b": params["b"]})
        return (
            bound.matmul(own, x),
            bound.rmatmul(own, y),
            bound.take(own, jnp.arange(N)),
            bound.materialize(own),
            grads,
        )

    for width in (1, 4, M):
        w = params["a"][:width].T @ params["b"][:width]
        *found, grads = results(jnp.int32(width))
        for got, want in zip(found, (x @ w, y @ w.T, w, w)):
            np.testing.assert_allclose(got, want, atol=1e-5)
        for grad in grads.values():
            moves = np.asarray(grad).any(axis=1)
            assert moves[:width].all() and not moves[width:].any()


def test_a_projection_is_the_best_at_every_width():
    bound, w = parse("ordered()").bind(N, M), np.random.default_rng(2).normal(size=(N, M)).astype(np.float32)

    @jax.jit
    def errors(w):
        params = bound.project(w)
        error = lambda width: jnp.sum((w - bound.materialize({**params, "width": width})) ** 2)
        return jax.vmap(error)(jnp.arange(1, M + 1))

    s = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(errors(w), [np.sum(s[k:] ** 2) for k in range(1, M + 1)], atol=1e-4)


def test_tail_norms_and_importance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 5)).astype(np.float32), rng.normal(size=(2, 6, 3)).astype(np.float32)
    a[:, 4:] = b[:, 4:] = 0
    want = [[np.linalg.norm(layer[i:]) for i in range(6)] for layer in a]
    results = jax.jit(lambda a, b: (tail_norms(a), importance(a, b), jax.grad(lambda f: jnp.sum(tail_norms(f)))(a)))
    tails, found, grad = jax.device_get(results(a, b))
    np.testing.assert_allclose(tails, want, rtol=1e-6)
    other = [[np.linalg.norm(layer[i:]) for i in range(6)] for layer in b]
    np.testing.assert_allclose(found, np.multiply(want, other), rtol=1e-6)
    assert np.all(np.diff(found) <= 0) and not found[:, 4:].any() and np.all(found[:, :4] > 0)
    scale = np.cumsum(1 / np.asarray(want)[:, :4], axis=1)[..., None]
    np.testing.assert_allclose(grad[:, :4], a[:, :4] * scale, rtol=1e-5)
    assert not grad[:, 4:].any()


def greedy(bounds, widths, importances, budget):
    """One component after another."""
    widths, start = list(widths), list(widths)
    size = lambda: sum(bound.params_at(k) for bound, k in zip(bounds, widths))
    while size() > budget:
        worst = min((i for i, k in enumerate(widths) if k > 1), key=lambda i: importances[i][widths[i] - 1])
        widths[worst] -= 1
    whole = lambda bound: bound.d_in * bound.d_out
    return [old if b.params_at(new) == whole(b) else new for b, new, old in zip(bounds, widths, start)]


def test_the_least_important_of_all_sites_go_first():
    rng = np.random.default_rng(0)
    bounds = [
        parse(text).bind(n, m) for text, n, m in (("ordered()", 12, 10), ("ordered(4)", 8, 6), ("ordered()", 3, 9))
    ]
    start, budgets = [9, 4, 3], (48, 60, 130, 195, 196, 500)
    ranked = [np.sort(rng.exponential(size=b.structure.rank))[::-1].astype(np.float32) for b in bounds]
    cut = jax.jit(lambda *args: [cut_widths(bounds, *args, budget) for budget in budgets])
    found = [np.asarray(widths).tolist() for widths in cut(np.array(start), ranked)]
    for budget, widths in zip(budgets, found):
        assert widths == greedy(bounds, start, ranked, budget), budget
        assert sum(b.params_at(k) for b, k in zip(bounds, widths)) <= budget
    assert found[0] == [1, 1, 1] and found[-1] == start
    with pytest.raises(StructureError, match="takes 48 numbers, more than 47"):
        cut_widths(bounds, np.array(start), ranked, 47)
    with pytest.raises(StructureError, match="more than can be counted"):
        large = [parse("ordered(20000)").bind(2**16 + 1, 2**16), parse("ordered(1)").bind(3, 4)]
        cut_widths(large, np.array([1, 1]), [np.ones(20000), np.ones(1)], 2**40)


def test_what_it_counts_and_what_a_width_would():
    bound = parse("ordered(rank=5)").bind(N, M)
    assert bound.params == 5 * (N + M) and bound.cost(3).flops == 2 * 3 * bound.params
    assert bound.cost(1).bits == 32 * (bound.params + 1)
    assert [bound.params_at(k) for k in (1, 5, 6)] == [21, 105, 108]
    assert parse("fit(ordered(), params=0.5)").bind(N, M).structure.rank == 2


@pytest.mark.parametrize("text", ["ordered(rank=0)", "ordered(rank=10)", "ordered(rnak=3)"])
def test_bad_arguments(text):
    with pytest.raises(StructureError, match="rank"):
        parse(text).bind(N, M)
