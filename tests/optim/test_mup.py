import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.models import GPT
from structmat.nn import assign, sites
from structmat.optim import decay_mask, leaf_multiplier, make_optimizer, make_schedule, multipliers
from structmat.structures import StructureError, flatten_leaves, parse
from tests.marks import mostly_long
from tests.optim.width import BASE, feature_update

WIDTHS = (64, 1024)
FLAT = 2.1
"""Largest ratio between the feature updates at any two of WIDTHS."""
LEVEL = (0.25, 3.0)
"""Feature update at width 1024 relative to dense."""

FAMILIES = [
    "dense()",
    "fit(low_rank(), params=0.25)",
    "fit(spectral(), params=0.25)",
    "diagonal()",
    "block_diagonal(blocks=4)",
    "block_low_rank(in_blocks=4, out_blocks=4, rank=4)",
    "monarch(blocks=4)",
    "fit(block_tensor_train(), params=0.25)",
    "kronecker(terms=1)",
    "kronecker(terms=4)",
    "tensor_train(rank=4, cores=3)",
    "fit(low_rank() + monarch(), params=0.5)",
    "monarch(blocks=4) + diagonal()",
    "weight_norm(monarch(blocks=4))",
    "dora(low_rank(rank=16))",
    "butterfly()",
    "householder(reflections=16)",
]
SPARSE = ["random_sparse(density=0.25)", "fit(low_rank() + random_sparse(), params=0.3)", "n_m_sparse(n=2, m=4)"]
"""Supports average out only in wide matrices: tested from width 512."""


@pytest.fixture(scope="module")
def dense_update():
    return feature_update("dense()", 1024)


@pytest.mark.parametrize("text", mostly_long(FAMILIES + SPARSE, (FAMILIES + SPARSE)[1::9]))
def test_feature_update_is_flat_in_width_and_near_dense(text, dense_update):
    updates = [feature_update(text, w) for w in (WIDTHS if text in FAMILIES else (512, 1024))]
    assert max(updates) / min(updates) < FLAT, updates
    assert LEVEL[0] < updates[-1] / dense_update < LEVEL[1], (updates, dense_update)


@pytest.mark.long
@pytest.mark.parametrize("text", FAMILIES)
def test_feature_update_is_flat_at_every_width_between(text):
    updates = [feature_update(text, w) for w in (64, 128, 256, 512, 1024)]
    assert max(updates) / min(updates) < FLAT, updates


def test_one_multiplier_for_the_whole_layer_is_not_enough():
    naive = [feature_update("kronecker(terms=1)", w, aware=False) for w in WIDTHS]
    assert naive[0] / naive[-1] > FLAT, naive


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense()", {"kernel": BASE / 256}),
        ("low_rank(rank=8)", {"a": BASE / 512, "b": BASE / 16}),
        ("monarch(blocks=4)", {"R": BASE / 256 * 2, "L": BASE / 256 * 2}),
        ("kronecker(terms=1)", {"a": BASE / 256 * 8, "b": BASE / 256 * 8}),
        ("block_low_rank(in_blocks=16, out_blocks=16, rank=4)", {"R": BASE / 32, "L": BASE / 128}),
    ],
)
def test_multipliers_are_those_of_the_paper(text, expected):
    """Compute Better Spent, Table 2, at width 256 and base width 64: kappa times d_base / d."""
    leaves = parse(text).bind(256, 256).leaves()
    found = {n: leaf_multiplier(leaf, "linear", BASE) for n, leaf in leaves.items()}
    assert found == pytest.approx(expected)


def test_terms_of_a_sum_share_and_frozen_terms_do_not():
    leaves = parse("low_rank(rank=8) + monarch(blocks=4)").bind(256, 256).leaves()
    assert leaf_multiplier(leaves["1"]["R"], "linear", BASE) == BASE / 256
    leaves = parse("frozen(dense()) + low_rank(rank=8)").bind(256, 256).leaves()
    assert leaf_multiplier(leaves["1"]["b"], "linear", BASE) == BASE / 16


def test_learned_scalars_keep_the_plain_rate():
    leaves = parse("weight_norm(monarch(blocks=4))").bind(256, 256).leaves()
    assert {leaf_multiplier(leaf, "linear", BASE) for _, leaf in flatten_leaves(leaves["gamma"])} == {1.0}
    assert leaf_multiplier(leaves["weights"]["R"], "linear", BASE) == BASE / 128


TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
SIZES = dict(vocab=16, context=8, layers=3, heads=2)


def trees(rules, width=32, scan=True):
    model = assign(GPT(**SIZES, width=width, scan=scan), rules, TOKENS)
    table, base = sites(model, TOKENS), sites(GPT(**SIZES, width=16, scan=False), TOKENS)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))["params"]
    return multipliers(table, base, params), decay_mask(table, params), params, table


def test_tree_follows_the_parameters_under_scan():
    factors, mask, params, _ = trees("layers_[01]/.* -> low_rank(rank=4); layers_2/mlp/up -> monarch(blocks=2)")
    assert jax.tree.structure(factors) == jax.tree.structure(params) == jax.tree.structure(mask)
    assert factors["layers_0to1"]["mlp"]["up"] == {"a": 16 / 64, "b": 16 / 8, "bias": 1.0}
    assert factors["layers_2"]["mlp"]["up"]["R"] == 16 / (16 * 2)
    assert factors["embed"]["kernel"] == 1.0 and factors["head"]["kernel"] == 0.5 and factors["positions"] == 1.0
    assert mask["layers_0to1"]["mlp"]["up"] == {"a": True, "b": True, "bias": False}
    assert not mask["layers_2"]["attn_norm"]["scale"] and not mask["positions"]


def test_a_site_missing_in_the_base_is_named():
    _, _, params, table = trees("dense()")
    with pytest.raises(StructureError, match="site head is not in the base model"):
        multipliers(table, {k: v for k, v in table.items() if k != "head"}, params)


SPEC = dict(name="adamw", lr=0.1, schedule="constant", warmup=0, weight_decay=0.5, b1=0.9, b2=0.99, eps=1e-8, clip=0.0)


def test_optimizer_scales_steps_but_not_decay():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = make_optimizer(SPEC, {"a": 2.0, "b": 1.0}, {"a": True, "b": False}, 10)
    updates, _ = tx.update({"a": jnp.ones(3), "b": jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.1 * (2 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -0.1, rtol=1e-5)
    plain = make_optimizer(SPEC | {"weight_decay": 0.0}, None, None, 10)
    expected = optax.adam(0.1, 0.9, 0.99)
    grads = {"a": jnp.arange(3.0), "b": -jnp.ones(3)}
    ours, theirs = (t.update(grads, t.init(params), params)[0] for t in (plain, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_rise_and_fall(name):
    schedule = make_schedule(SPEC | {"schedule": name, "warmup": 0.1}, 100)
    assert schedule(0) == 0 and schedule(10) == pytest.approx(0.1) and schedule(100) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adamww"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"warmup": 10}, "warmup=10 steps must be below steps=10"),
    ],
)
def test_bad_specs(change, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(SPEC | change, None, None, 10)
