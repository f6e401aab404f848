"""What a merge of ReLoRA changes, and what it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from structmat.nn.sites import Site, Stack
from structmat.sparse.relora import Merge, find_adapters
from structmat.sparse.warm_up import warm_up
from structmat.structures import parse
from structmat.training.state import TrainState

BOUND = parse("low_rank(rank=3) + frozen(dense())").bind(12, 10)
KEY = functools.partial(jax.random.key, impl="unsafe_rbg")


@functools.cache
def merged():
    """(state before, state after) for a stack of two layers; moments unlike 0."""
    params, frozen = {"0": {}, "bias": np.ones(10, np.float32)}, {"1": {}}
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params["0"], frozen["1"] = {"a": draw(2, 3, 12), "b": draw(2, 3, 10)}, {"kernel": draw(2, 12, 10)}
    tx = optax.chain(optax.scale_by_adam(), warm_up(["g_0to1/0/a", "g_0to1/0/b"], 3))
    params, frozen = {"g_0to1": params}, {"g_0to1": frozen}
    opt_state = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 2, tx.init(params))
    state = TrainState(jnp.int32(20), params, frozen, opt_state, {}, jnp.zeros(2, jnp.int32))
    sites = {f"g_{i}": Site(BOUND, "linear", Stack("g_0to1", i, 2)) for i in range(2)}
    return state, jax.jit(Merge(find_adapters(sites), 10).update)(KEY(0), jnp.int32(20), {}, state)


def parts(state, layer):
    a, b = (np.asarray(state.params["g_0to1"]["0"][name])[layer] for name in "ab")
    return a, b, np.asarray(state.frozen["g_0to1"]["1"]["kernel"])[layer]


def test_a_merge_leaves_the_function_and_begins_anew():
    before, after = merged()
    for layer in range(2):
        (a, b, w), (fresh, zero, sum_) = parts(before, layer), parts(after, layer)
        np.testing.assert_allclose(sum_, w + a.T @ b, atol=1e-5)
        assert not zero.any() and np.abs(fresh - a).min() > 1e-6
        assert 0.5 < fresh.std() / BOUND.leaves()["0"]["a"].std < 1.5
    assert np.abs(parts(after, 0)[0] - parts(after, 1)[0]).min() > 1e-6
    adam, warm = after.opt_state
    for moments in (adam.mu["g_0to1"], adam.nu["g_0to1"]):
        assert not moments["0"]["a"].any() and not moments["0"]["b"].any() and (np.asarray(moments["bias"]) == 2).all()
    assert int(warm.since) == 0 and int(adam.count) == 2
    np.testing.assert_array_equal(after.params["g_0to1"]["bias"], before.params["g_0to1"]["bias"])


def test_it_is_due_at_whole_intervals():
    rule = Merge((), 10)
    assert [step for step in range(1, 31) if rule.due(step)] == [10, 20, 30]
