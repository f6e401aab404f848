"""What moves when a support moves, on arrays alone: no model is traced here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from structmat.parallel import make_mesh
from structmat.sparse import Mask, MoveSupport, cosine_drop, move
from structmat.sparse.masks import map_mirrors
from structmat.training.state import TrainState
from tests.marks import mostly_long

key = functools.partial(jax.random.key, impl="unsafe_rbg")
MOVE = jax.jit(move, static_argnums=4)
COUNT = 30


def state_of(layers, shape=(16, 8), seed=0):
    """A state whose only site, "a", is a stack of masked weights (layers, *shape) or, for None, one of them."""
    rng = np.random.default_rng(seed)
    stack = () if layers is None else (layers,)
    order = rng.permuted(np.tile(np.arange(shape[0] * shape[1]), (layers or 1, 1)), axis=1)
    mask = jnp.asarray((order < COUNT).reshape(*stack, *shape))
    w = jnp.asarray(rng.normal(size=(*stack, *shape)), jnp.float32)
    params = {"a": {"bias": jnp.ones(shape[1]), "weights": {"kernel": w}}}
    tx = optax.adam(1e-3)
    opt_state = jax.tree.map(lambda leaf: leaf + 1, tx.init(params))
    return TrainState(jnp.int32(20), params, {"a": {"mask": mask}}, opt_state, {}, jnp.zeros(2, jnp.int32))


def rule_of(layers, grow, drop=0.4):
    numbers = (0,) if layers is None else tuple(range(layers))
    return MoveSupport((Mask(("a",), (), COUNT, numbers, layers is not None),), 10, drop, 80, grow)


def gradients(state, seed=5):
    shape = state.params["a"]["weights"]["kernel"].shape
    return {"a": jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)}


@functools.cache
def moved(grow, layers=2):
    """(state before, state after) of one update at step 20 of 80."""
    state, rule = state_of(layers), rule_of(layers, grow)
    return state, jax.jit(rule.update)(key(0), jnp.int32(20), gradients(state), state)


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (0, [0, 1, 0, 1, 0, 1, 1, 0]),
        (1, [1, 1, 0, 1, 0, 1, 0, 0]),
        (2, [1, 1, 0, 0, 1, 1, 0, 0]),
        (3, [1, 0, 1, 0, 1, 1, 0, 0]),
        (4, [1, 0, 1, 0, 1, 1, 0, 0]),
    ],
)
def test_masks_of_jaxpruners_own_example(drop, expected):
    """Sizes in the order of its signed drop scores 1, -1, 8, -2; an entry may be dropped and grown at once."""
    w, mask = jnp.array([9.0, 3, 9, 2, 9, 4, 1, 9]), jnp.array([0, 1, 0, 1, 0, 1, 1, 0], bool)
    score = jnp.array([9.0, 1, 4, 1, 5, 8, 2, 3])
    assert MOVE(w, mask, score, jnp.int32(drop), 4).astype(int).tolist() == expected


def test_drops_the_smallest_and_grows_the_best_outside_what_is_kept():
    rng = np.random.default_rng(0)
    for drop in (0, 7, COUNT):
        for ties in (False, True):
            w, score = rng.normal(size=(2, 12, 10)).astype(np.float32)
            w, score = (np.round(a) if ties else a for a in (w, np.abs(score)))
            mask = (rng.permutation(120) < COUNT).reshape(12, 10)
            new = np.asarray(MOVE(w, mask, score, jnp.int32(drop), COUNT))
            order = sorted(np.flatnonzero(mask), key=lambda i: (-abs(w.flat[i]), i))
            kept, rest = order[: COUNT - drop], [i for i in range(120) if i not in set(order[: COUNT - drop])]
            grown = sorted(rest, key=lambda i: (-score.flat[i], i))[:drop]
            assert set(np.flatnonzero(new)) == {*kept, *grown} and not set(kept) & set(grown)


@pytest.mark.parametrize("grow", mostly_long(["gradient", "random"], ["random"]))
def test_sizes_weights_and_moments_of_a_stack(grow):
    before, after = moved(grow)
    fraction = 0.2 * (1 + np.cos(np.pi * 20 / 80))
    for layer in range(2):
        old, new = (np.asarray(s.frozen["a"]["mask"][layer]) for s in (before, after))
        w = np.asarray(before.params["a"]["weights"]["kernel"][layer])
        stayed = old & new
        assert new.sum() == COUNT
        dropped = int(fraction * COUNT)
        assert COUNT - dropped <= stayed.sum() < COUNT
        kept = set(sorted(np.flatnonzero(old), key=lambda i: -abs(w.flat[i]))[: COUNT - dropped])
        assert kept <= set(np.flatnonzero(new))
        np.testing.assert_array_equal(after.params["a"]["weights"]["kernel"][layer], np.where(stayed, w, 0))
        for moments in (after.opt_state[0].mu, after.opt_state[0].nu):
            np.testing.assert_array_equal(moments["a"]["weights"]["kernel"][layer], stayed)
            np.testing.assert_array_equal(moments["a"]["bias"], 1)
    np.testing.assert_array_equal(after.params["a"]["bias"], before.params["a"]["bias"])
    assert int(after.opt_state[0].count) == 1


@pytest.mark.long
def test_draws_of_a_layer_do_not_depend_on_its_stack():
    before, cut = state_of(2), lambda tree, layer: jax.tree.map(lambda a: a[layer] if a.ndim > 2 else a, tree)

    @jax.jit
    def masks(k):
        stacked = rule_of(2, "random").update(k, jnp.int32(20), {}, before).frozen["a"]["mask"]
        alone = [
            MoveSupport((Mask(("a",), (), COUNT, (layer,), False),), 10, 0.4, 80, "random").update(
                k, jnp.int32(20), {}, cut(before, layer)
            )
            for layer in range(2)
        ]
        return stacked, jnp.stack([state.frozen["a"]["mask"] for state in alone])

    stacked, alone = masks(jax.random.key(0))
    np.testing.assert_array_equal(stacked, alone)


@pytest.mark.parametrize("grow", mostly_long(["gradient", "random"], ["random"]))
def test_sharded_masks_move_alike_and_without_gathers(grow):
    before, after = moved(grow)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    place = lambda leaf: NamedSharding(
        mesh, PartitionSpec(None, "fsdp", "tensor") if jnp.ndim(leaf) == 3 else PartitionSpec()
    )
    whole = (before, gradients(before))
    state, grads = jax.device_put(whole, jax.tree.map(place, whole))
    outputs = jax.tree.map(place, after)
    step = jax.jit(rule_of(2, grow).update, out_shardings=outputs)
    compiled = step.lower(key(0), jnp.int32(20), grads, state).compile()
    for got, want in zip(jax.tree.leaves(compiled(key(0), jnp.int32(20), grads, state)), jax.tree.leaves(after)):
        np.testing.assert_array_equal(got, want)
    assert "all-gather" not in compiled.as_text() and "all-reduce" in compiled.as_text()


@pytest.mark.long
def test_random_growth_reaches_every_free_entry():
    state, rule = state_of(None), rule_of(None, "random")
    masks = jax.jit(jax.vmap(lambda k: rule.update(k, jnp.int32(20), {}, state).frozen["a"]["mask"]))(
        jax.random.split(key(1), 300)
    )
    old, share = np.asarray(state.frozen["a"]["mask"]), np.asarray(masks).mean(0)
    free = share[~old]
    assert np.all(np.asarray(masks).sum((1, 2)) == COUNT)
    assert free.min() > 0 and free.max() < 0.25  # 10 of 108 are grown: 0.093, and a standard error of 0.017


def test_the_fraction_dropped_falls_to_nothing():
    at = lambda step: float(cosine_drop(jnp.int32(step), 0.3, 80))
    assert (at(0), at(40), at(80)) == pytest.approx((0.3, 0.15, 0.0), abs=1e-7)
    rule = rule_of(None, "random")
    assert [step for step in range(101) if rule.due(jnp.int32(step))] == [0, 10, 20, 30, 40, 50, 60, 70]


OPTIMISERS = {
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "steps": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "parts": optax.partition({"x": optax.adam(1e-3), "y": optax.sgd(1e-3)}, {"a": {"w": "x"}, "b": {"a": {"w": "y"}}}),
    "masked": optax.masked(optax.trace(0.9), {"a": {"w": True}, "b": {"a": {"w": False}}}),
}
MIRRORS = {"adamw": 2, "momentum": 1, "lion": 1, "factored": 0, "steps": 3, "parts": 2, "masked": 1}
"""How many leaves of a state have the shape of a/w and stand for it."""


@pytest.mark.parametrize("name", mostly_long([*OPTIMISERS], ("adamw", "parts")))
def test_moments_are_found_in_every_optimiser(name):
    params = {"a": {"w": np.ones((8, 6), np.float32)}, "b": {"a": {"w": np.ones((8, 6), np.float32)}}}
    tx = OPTIMISERS[name]
    _, state = tx.update(params, tx.init(params), params)
    marked = map_mirrors(lambda path, leaf: leaf + 7 if path == "a/w" else leaf, params, state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    changed = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), new.shape)
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(marked), jax.tree.leaves(state))
        if (np.asarray(new) != np.asarray(old)).any()
    ]
    assert len(changed) == MIRRORS[name] and all(shape == (8, 6) for _, shape in changed)
    assert not any(path.endswith("b/a/w") for path, _ in changed)
