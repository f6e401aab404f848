import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import GPT, MLP
from structmat.nn import assign, leaf_groups, site_params, sites
from structmat.structures import StructureError
from tests.marks import mostly_long
from tests.models.helpers import decoded, shaken

TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
SIZES = dict(vocab=32, context=12, layers=3, width=16, heads=2)
RULES = "layers_[01]/.* -> monarch(blocks=2); layers_2/mlp/up -> low_rank(rank=3)"


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 32)


def test_sites_speak_of_layers_and_know_their_stack(tokens):
    model = assign(GPT(**SIZES), RULES, TOKENS)
    table = sites(model, TOKENS)
    assert len(table) == 3 * 6 + 2
    assert table["layers_1/mlp/up"].stack.path == "layers_0to1/mlp/up"
    assert table["layers_2/mlp/up"].bound.structure.name == "low_rank" and table["layers_2/mlp/up"].stack is None
    assert table["embed"].kind == "embed" and table["head"].kind == "head"
    held = shaken(model, tokens)
    a = site_params(held, "layers_1/mlp/up", table["layers_1/mlp/up"])
    np.testing.assert_array_equal(a["R"], held["params"]["layers_0to1"]["mlp"]["up"]["R"][1])
    places = leaf_groups(table)
    assert len(places) == 2 * 6 + 2 and places[("layers_0to1", "mlp", "up")][0] == "layers_0/mlp/up"


def unstack(held):
    """The same parameters for the model without scan."""
    params = {k: v for k, v in held["params"].items() if "to" not in k}
    for k, v in held["params"].items():
        if "to" in k:
            first, last = k.removeprefix("layers_").split("to")
            for j, i in enumerate(range(int(first), int(last) + 1)):
                params[f"layers_{i}"] = jax.tree.map(lambda a, j=j: a[j], v)
    return {"params": params}


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scanned_equals_unrolled(tokens, remat):
    model = assign(GPT(**SIZES, remat=remat), RULES, TOKENS)
    held = shaken(model, tokens)
    plain = model.clone(scan=False, remat="none")
    loss = lambda m: jax.jit(jax.value_and_grad(lambda p: jnp.mean(m.apply({"params": p}, tokens) ** 2)))
    a, ga = loss(model)(held["params"])
    b, gb = loss(plain)(unstack(held)["params"])
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, atol=2e-5), unstack({"params": ga})["params"], gb)


def test_causality(tokens):
    model = GPT(**SIZES)
    held = shaken(model, tokens)
    embed = held["params"]["embed"]["kernel"]
    pick_out = lambda e: model.apply({"params": held["params"] | {"embed": {"kernel": e}}}, jnp.arange(12)[None])[
        0, 5
    ].sum()
    grads = jnp.abs(jax.jit(jax.grad(pick_out))(embed)).sum(1)
    assert (grads[:6] > 0).all() and not grads[6:12].any()


@pytest.mark.parametrize("rules", mostly_long(["dense()", RULES], ["dense()"]))
def test_decoding_with_the_cache_equals_the_full_forward(tokens, rules):
    model = assign(GPT(**SIZES), rules, TOKENS)
    held = shaken(model, tokens)
    logits, _ = decoded(model, held, tokens)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(held, tokens), atol=1e-4)


def test_tied_head_uses_the_embedding(tokens):
    model = GPT(**SIZES, tie=True)
    held = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
    assert "head" not in held["params"]
    logits = jax.jit(model.apply)(held, tokens)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()
    assert logits.shape == (2, 12, 32) and abs(loss - jnp.log(32)) < 1


def test_resolved_budget_is_what_the_table_says():
    model = assign(GPT(**SIZES), "fit(low_rank(), params=0.5)", TOKENS)
    assert dict(model.structures)["layers_0/attn/q"].rank == 4
    assert dict(model.structures)["head"].name == "dense"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("layers_9/.* -> low_rank(rank=2)", "matches no site; near: layers_"),
        (".* -> low_rank(rank=2); head -> dense()", "earlier rules took: head"),
        ("monarch(blocks=3)", r"site layers_0/attn/k: monarch: blocks=3 does not fit a weight of shape \(16, 16\)"),
        ("layers_(0 -> dense()", "not a regular expression"),
    ],
)
def test_bad_rules_are_refused_with_their_place(rules, message):
    with pytest.raises(StructureError, match=message):
        assign(GPT(**SIZES), rules, TOKENS)


def test_sizes_are_checked(tokens):
    with pytest.raises(ValueError, match="heads=3 must divide width=16"):
        GPT(**SIZES | {"heads": 3}).init(jax.random.key(0), tokens)
    with pytest.raises(ValueError, match="13 tokens do not fit context=12"):
        GPT(**SIZES).init(jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="remat must be one of"):
        GPT(**SIZES, remat="some").init(jax.random.key(0), tokens)


def test_mlp_sites_and_shapes():
    x = jnp.ones((4, 64))
    model = assign(MLP(width=32), "low_rank(rank=2)", x)
    assert [s.kind for s in sites(model, x).values()] == ["head", "linear", "linear"]
    assert model.apply(nn.unbox(model.init(jax.random.key(0), x)), x).shape == (4, 10)
