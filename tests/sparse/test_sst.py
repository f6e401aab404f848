"""What turns when SST goes to other triplets, on arrays alone, and the law of the draw."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from structmat.parallel import make_mesh
from structmat.sparse.places import Place
from structmat.sparse.spectral import TurnTriplets, next_order
from structmat.sparse.warm_up import WarmUp, warm_up
from structmat.structures import parse
from structmat.training.state import TrainState
from tests.marks import mostly_long

key = functools.partial(jax.random.key, impl="unsafe_rbg")
N, M, R, EVERY = 12, 10, 4, 5
BOUND = parse(f"sst(rank={R})").bind(N, M)
ROUND = 3  # ceil(10 / 4) iterations


def state_of(layers=2, seed=0):
    """A state whose only site, "a", is a stack of triplets (layers, ...) as the optimiser leaves them; moments unlike 0."""
    rng, stack = np.random.default_rng(seed), () if layers is None else (layers,)
    draw = lambda *shape: rng.normal(size=(*stack, *shape)).astype(np.float32)
    s = draw(M) + 1
    assert (s < 0).any()
    params = {"a": {"s": s, "u": draw(R, N), "v": draw(R, M), "bias": np.ones(M, np.float32)}}
    rest = {"u_rest": draw(M - R, N) / N**0.5, "v_rest": draw(M - R, M) / M**0.5}
    tx = optax.chain(optax.scale_by_adam(), warm_up(["a/u", "a/v"], 3))
    mark = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) if leaf.ndim else 7, leaf.dtype)
    state = TrainState(
        jnp.int32(0), params, {"a": rest}, jax.tree.map(mark, tx.init(params)), {}, jnp.zeros(2, jnp.int32)
    )
    return jax.tree.map(jnp.asarray, state)


def rule_of(layers=2, sampling="mixed", renew=True, first=0):
    numbers = (first,) if layers is None else tuple(range(layers))
    return TurnTriplets((Place(("a",), (), BOUND, numbers, layers is not None),), EVERY, sampling, renew)


@functools.cache
def compiled(sampling="mixed", renew=True):
    rule = rule_of(sampling=sampling, renew=renew)
    return jax.jit(lambda step, state: rule.update(key(step), step, {}, state))


@functools.cache
def after(iteration, into=0, **arguments):
    """The state of two layers, and it after the update `into` steps after the beginning of an iteration."""
    state = state_of()
    return state, compiled(**arguments)(jnp.int32(1 + EVERY * iteration + into), state)


def held(state, layer=0):
    """u, s and v of all triplets of a layer."""
    p, f = (
        {n: np.asarray(v)[layer] for n, v in tree["a"].items() if n != "bias"} for tree in (state.params, state.frozen)
    )
    return np.concatenate([p["u"], f["u_rest"]]), p["s"], np.concatenate([p["v"], f["v_rest"]])


def matrix(state, layer=0):
    u, s, v = held(state, layer)
    return (u.T * s) @ v


def settled(state):
    """What the optimiser left, with s at 0 or above and the vectors that train of unit length, in numpy."""
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    own = state.params["a"]
    new = {"s": np.maximum(own["s"], 0), "u": unit(np.asarray(own["u"])), "v": unit(np.asarray(own["v"]))}
    return state.replace(params={"a": {**own, **new}})


def adam(state):
    return state.opt_state[0]


def test_within_an_iteration_the_inactive_stay_and_the_others_are_clamped_and_normalised():
    before, now = after(1, into=2)
    wanted = settled(before)
    for name in "suv":
        np.testing.assert_allclose(now.params["a"][name], wanted.params["a"][name], rtol=1e-6)
    assert np.asarray(now.params["a"]["s"]).min() == 0
    for name in ("u_rest", "v_rest"):
        np.testing.assert_array_equal(now.frozen["a"][name], before.frozen["a"][name])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), now.opt_state, before.opt_state)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("sampling", mostly_long(["mixed", "uniform", "top", "sequential"], ["mixed"]))
def test_the_next_set_takes_its_values_along_and_begins_without_moments(sampling):
    before, now = after(1, sampling=sampling)
    for layer in range(2):
        old, new = held(settled(before), layer), held(now, layer)
        order = [int(np.argmin(np.abs(old[0] - row).sum(1))) for row in new[0]]
        assert sorted(order) == list(range(M)) and order != list(range(M))
        for a, b in zip(old, new):
            np.testing.assert_allclose(b, a[order], rtol=1e-6)
        np.testing.assert_allclose(matrix(now, layer), matrix(settled(before), layer), atol=1e-5)
        for moments in ("mu", "nu"):
            was, got = (np.asarray(getattr(adam(state), moments)["a"]["s"])[layer] for state in (before, now))
            np.testing.assert_array_equal(got, was[order])
    for moments in (adam(now).mu, adam(now).nu):
        assert not np.any(moments["a"]["u"]) and not np.any(moments["a"]["v"]) and np.all(moments["a"]["bias"] != 0)
    assert int(now.opt_state[1].since) == 0 and int(adam(now).count) == int(adam(before).count)


def test_layers_draw_for_themselves():
    _, now = after(1)
    rows = [held(now, layer)[0][:R] for layer in range(2)]
    old = [held(settled(state_of()), layer)[0] for layer in range(2)]
    chosen = [{int(np.argmin(np.abs(o - row).sum(1))) for row in r} for o, r in zip(old, rows)]
    assert chosen[0] != chosen[1]


def test_a_round_ends_with_an_svd_that_changes_nothing():
    before, now = after(ROUND)
    for layer in range(2):
        u, s, v = held(now, layer)
        np.testing.assert_allclose(matrix(now, layer), matrix(settled(before), layer), atol=1e-5)
        for vectors in (u, v):
            assert np.abs(vectors @ vectors.T - np.eye(M)).max() < 1e-5
        np.testing.assert_allclose(-np.sort(-s), np.linalg.svd(matrix(settled(before), layer))[1], atol=1e-5)
    for moments in (adam(now).mu, adam(now).nu):
        assert not any(np.any(moments["a"][name]) for name in "suv") and np.all(moments["a"]["bias"] != 0)


@pytest.mark.long
def test_without_renewal_a_round_ends_like_an_iteration():
    before, now = after(ROUND, renew=False)
    np.testing.assert_allclose(np.sort(held(now)[1]), np.sort(held(settled(before))[1]), rtol=1e-6)
    assert np.any(adam(now).mu["a"]["s"])
    _, first = after(0)
    assert np.any(adam(first).mu["a"]["s"])  # nor does training begin with an SVD of what is one


def inclusion(p, rank):
    """Of every item in a set of `rank` drawn one after another without replacement in proportion to p."""
    found = np.zeros(len(p))
    for chosen in itertools.permutations(range(len(p)), rank):
        chance, left = 1.0, 1.0
        for i in chosen:
            chance, left = chance * p[i] / left, left - p[i]
        found[list(chosen)] += chance
    return found


@functools.cache
def frequencies(sampling, values, rank=2, draws=4000):
    order = jax.vmap(lambda k: next_order(k, jnp.asarray(values), rank, sampling, False))
    chosen = np.asarray(jax.jit(order)(jax.random.split(jax.random.key(0), draws)))[:, :rank]
    return np.bincount(chosen.ravel(), minlength=len(values)) / draws


VALUES = (4.0, 1.0, 0.5, 0.0, 2.0)


@pytest.mark.parametrize(
    ("sampling", "values"),
    mostly_long(
        [("mixed", VALUES), ("mixed", (3.0,) * 5), ("mixed", (0.0,) * 5), ("uniform", VALUES)], [("mixed", VALUES)]
    ),
)
def test_triplets_are_drawn_by_the_mixed_law(sampling, values):
    share = np.array(values) / sum(values) if sum(values) and sampling == "mixed" else np.full(5, 0.2)
    wanted = inclusion(0.5 * (0.2 + share), 2)
    assert wanted.sum() == pytest.approx(2) and (wanted.std() > 0.1) == (share.std() > 0)
    np.testing.assert_allclose(frequencies(sampling, values), wanted, atol=0.03)  # standard error 0.008


def test_top_and_sequential_are_what_they_say():
    order = lambda sampling, fresh: next_order(key(0), jnp.asarray(VALUES), 2, sampling, fresh).tolist()
    assert order("top", False)[:2] == [0, 4]
    assert order("sequential", True) == [0, 1, 2, 3, 4] and order("sequential", False) == [2, 3, 4, 0, 1]


def test_updates_of_new_vectors_grow_from_nothing():
    link, updates = warm_up(["a/u"], 4), {"a": {"u": np.ones(2, np.float32), "s": np.ones(2, np.float32)}}
    state, factors = link.init(updates), []
    for _ in range(6):
        scaled, state = link.update(updates, state)
        factors.append(float(scaled["a"]["u"][0]))
        np.testing.assert_array_equal(scaled["a"]["s"], 1)
    assert factors == [0, 0.25, 0.5, 0.75, 1, 1] and state == WarmUp(6)


@pytest.mark.long
def test_draws_of_a_layer_do_not_depend_on_its_stack():
    whole = state_of()

    @jax.jit
    def values(step):
        k = jax.random.key(0)
        stacked = rule_of().update(k, step, {}, whole)
        alone = []
        for layer in range(2):
            cut = lambda leaf, layer=layer: leaf[layer] if leaf.ndim > 1 else leaf
            one = rule_of(None, first=layer).update(k, step, {}, jax.tree.map(cut, whole))
            alone.append(one.params["a"]["s"])
        return stacked.params["a"]["s"], jnp.stack(alone)

    for iteration in (1, ROUND):
        stacked, alone = values(jnp.int32(1 + EVERY * iteration))
        np.testing.assert_allclose(stacked, alone, rtol=1e-6)


@pytest.mark.long
def test_sharded_triplets_turn_alike():
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    place = lambda leaf: NamedSharding(mesh, PartitionSpec(None, None, "fsdp") if leaf.ndim == 3 else PartitionSpec())
    before = state_of()
    before.params["a"]["s"] = jnp.abs(before.params["a"]["s"])  # two zeros would leave the SVD a choice
    places = jax.tree.map(place, before)
    step = jax.jit(lambda n, state: rule_of().update(key(n), n, {}, state), out_shardings=places)
    for iteration in (1, ROUND):
        number = jnp.int32(1 + EVERY * iteration)
        got, wanted = step(number, jax.device_put(before, places)), compiled()(number, before)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(a, b, atol=1e-4)
