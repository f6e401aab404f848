"""Ordered sites cut and sliced: the function stays, the least important of all layers go first."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import GPT, MLP
from structmat.nn import assign, sites
from structmat.structures import StructureError
from structmat.structures.ordered import importance
from structmat.surgery import by_layer, sliced, widths_of, widths_within, with_widths

X = np.random.default_rng(9).normal(size=(5, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """(model, its variables, its sites): two hidden layers of 24 units."""
    own = assign(MLP(classes=4, width=24, depth=2), "ordered()", X)
    return own, nn.meta.unbox(jax.jit(own.init)(jax.random.key(0), X)), sites(own, X)


def test_sliced_it_is_the_same_function(model):
    own, variables, table = model
    assert widths_of(table, variables) == {"layers_0": 16, "layers_1": 24}
    variables = with_widths(table, variables, {"layers_0": 4, "layers_1": 13})
    new, held = sliced(own, variables, X)
    found = {path: site.bound.structure.short() for path, site in sites(new, X).items()}
    assert found == {"layers_0": "low_rank(rank=4)", "layers_1": "dense()", "head": "dense()"}
    assert held["params"]["layers_0"]["a"].shape == (4, 16) and "frozen" not in held
    np.testing.assert_array_equal(held["params"]["layers_0"]["b"], variables["params"]["layers_0"]["b"][:4])
    np.testing.assert_allclose(new.apply(held, X), own.apply(variables, X), rtol=1e-5, atol=1e-5)
    assert held["params"]["head"]["kernel"] is variables["params"]["head"]["kernel"]
    with pytest.raises(
        StructureError, match=r"no site that is ordered\(\); its structures: dense\(\), low_rank\(rank=4\)"
    ):
        sliced(new, held, X)


@pytest.mark.long
def test_a_budget_takes_the_least_important_of_all_layers(model):
    own, variables, table = model
    widths = widths_within(table, variables, 500)
    cut = with_widths(table, variables, widths)
    assert sum(table[path].bound.params_at(width) for path, width in widths.items()) <= 500
    params = sliced(own, cut, X)[1]["params"]
    assert sum(params[path][name].size for path in widths for name in ("a", "b")) <= 500
    leaves = [[variables["params"][path][name] for name in ("a", "b")] for path in widths]
    ranked = dict(zip(widths, jax.device_get(jax.jit(lambda held: [importance(*own) for own in held])(leaves))))
    kept = min(float(ranked[path][width - 1]) for path, width in widths.items())
    gone = max(float(ranked[path][width]) for path, width in widths.items())
    assert gone <= kept
    assert widths_within(table, variables, 10**6) == widths_of(table, variables)
    with pytest.raises(StructureError, match="one component of every site takes 88 numbers, more than 80"):
        widths_within(table, variables, 80)


def test_widths_never_grow(model):
    _, variables, table = model
    with pytest.raises(StructureError, match="site layers_0: width 17 must be from 1 to 16"):
        with_widths(table, variables, {"layers_0": 17})
    with pytest.raises(StructureError, match="width 0 must be from 1"):
        with_widths(table, variables, {"layers_1": 0})
    with pytest.raises(StructureError, match="no ordered site 'layer_1'; did you mean 'layers_1'"):
        with_widths(table, variables, {"layer_1": 3})


@pytest.mark.long
def test_layers_of_a_scanned_group_may_end_apart():
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    own = assign(GPT(vocab=64, width=16, layers=2, heads=2, context=12), "ordered()", tokens)
    variables, table = nn.meta.unbox(jax.jit(own.init)(jax.random.key(0), tokens)), sites(own, tokens)
    assert all(site.stack for site in table.values() if site.kind == "linear")
    variables = with_widths(table, variables, {"layers_0/mlp/up": 3, "layers_1/mlp/up": 5, "layers_1/attn/q": 1})
    new, held = sliced(own, variables, tokens)
    found = {path: site.bound.structure.short() for path, site in sites(new, tokens).items()}
    assert found["layers_0/mlp/up"] == "low_rank(rank=3)" and found["layers_1/mlp/up"] == "low_rank(rank=5)"
    assert found["layers_0/attn/q"] == "dense()" and found["layers_1/attn/q"] == "low_rank(rank=1)"
    np.testing.assert_allclose(new.apply(held, tokens), own.apply(variables, tokens), rtol=1e-4, atol=1e-4)
    old, now = by_layer(variables["params"]), by_layer(held["params"])
    take = lambda piece: piece[0] if piece[1] is None else piece[0][piece[1]]
    for path in ("layers_1/mlp/up/bias", "layers_0/mlp/up/bias"):
        np.testing.assert_array_equal(take(now[path]), take(old[path]))
