"""BTT-MoE: against plain block tensor trains, expert by expert, and what its balance term counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.nn import AUXILIARY, StructuredDense, StructuredEmbed
from structmat.structures.btt_moe import BttMoe

IN, OUT = 24, 36
X = jax.random.normal(jax.random.key(9), (5, 2, IN))


def drawn(experts=4, active=2, gate=0.0, **fields):
    bound = BttMoe(experts=experts, active=active, **fields).bind(IN, OUT)
    params = bound.init(jax.random.key(0))
    return bound, params | {"gate": gate * jax.random.normal(jax.random.key(1), (IN, experts))}


def expert(bound, params, e):
    """The dense matrix of one expert."""
    return bound.one.materialize({"R": params["R"][..., e : e + 1], "L": params["L"][:, :, e : e + 1]})


def test_outputs_are_weighted_sums_over_the_chosen_experts():
    bound, params = drawn(gate=1.0)
    logits = np.asarray(X @ params["gate"])
    wanted = np.zeros((5, 2, OUT))
    for i in np.ndindex(5, 2):
        chosen = np.argsort(-logits[i])[:2]
        share = np.exp(logits[i][chosen]) / np.exp(logits[i][chosen]).sum()
        wanted[i] = sum(g * np.asarray(X[i] @ expert(bound, params, e)) for g, e in zip(share, chosen))
    np.testing.assert_allclose(bound.matmul(params, X), wanted, atol=1e-5)
    ids = jnp.array([[3, 0], [23, 7]])
    np.testing.assert_allclose(bound.take(params, ids), bound.matmul(params, jnp.eye(IN)[ids]), atol=1e-5)


def test_with_all_experts_and_no_gate_it_is_a_block_tensor_train():
    bound, params = drawn(experts=3, active=3)
    plain = structmat.parse("block_tensor_train(rank=3, order='blocked')").bind(IN, OUT)
    both = {"R": params["R"], "L": params["L"]}
    np.testing.assert_allclose(3 * bound.matmul(params, X), plain.matmul(both, X), atol=1e-5)


def test_the_order_of_experts_does_not_matter_and_only_chosen_ones_learn():
    bound, params = drawn(gate=1.0)
    order = jnp.array([2, 0, 3, 1])
    mixed = {"R": params["R"][..., order], "L": params["L"][:, :, order], "gate": params["gate"][:, order]}
    np.testing.assert_allclose(bound.matmul(mixed, X), bound.matmul(params, X), atol=1e-5)
    one = X[0, 0]
    grads = jax.grad(lambda p: jnp.sum(bound.matmul(p, one) ** 2))(params)
    chosen = set(np.argsort(-np.asarray(one @ params["gate"]))[:2].tolist())
    assert {e for e in range(4) if np.any(grads["R"][..., e])} == chosen
    assert {e for e in range(4) if np.any(grads["L"][:, :, e])} == chosen


@pytest.mark.long
def test_the_balance_term_is_least_where_experts_are_used_alike():
    bound, params = drawn(balance=1.0)
    even = params | {"gate": jnp.eye(IN)[:, :4] * 8}
    alone = params | {"gate": jnp.zeros((IN, 4)).at[:, 0].set(8.0)}
    rows = jnp.eye(IN)[:4]
    log = lambda p: 0.1 * np.mean(np.square(jax.nn.logsumexp(rows @ p["gate"], axis=-1)))
    assert float(bound.auxiliary(even, rows)) - log(even) == pytest.approx(1.0, abs=0.3)
    assert float(bound.auxiliary(alone, rows)) - log(alone) == pytest.approx(2.0, abs=0.01)  # one of two all have
    assert BttMoe(experts=4, balance=0.0).bind(IN, OUT).auxiliary(params, rows) is None
    grads = jax.grad(lambda p: bound.auxiliary(p, rows))(params)
    assert np.any(grads["gate"]) and not np.any(grads["R"])
    assert np.all(grads["gate"][:4, :2].sum(1) > grads["gate"][:4, 2:].sum(1))  # away from the first, which ties choose


def test_weight_norm_caps_the_cores_and_leaves_the_gate():
    normed = structmat.parse("weight_norm(btt_moe(experts=4))").bind(IN, OUT)
    params = normed.init(jax.random.key(0))
    assert set(params["gamma"]) == {"R", "L"} and set(params["weights"]) == {"R", "L", "gate"}
    plain, weights = normed.inner, {**params["weights"], "gate": jnp.eye(IN)[:, :4] * 8}
    large = {"weights": {**weights, "R": 100 * weights["R"]}, "gamma": params["gamma"]}
    excess = {name: jnp.sqrt(jnp.mean(large["weights"][name] ** 2)) / plain.leaves()[name].std for name in "RL"}
    capped = {name: w / jnp.maximum(1, excess.get(name, 1)) for name, w in large["weights"].items()}
    assert excess["R"] > 50
    np.testing.assert_allclose(normed.matmul(large, X), plain.matmul(capped, X), atol=1e-5)
    assert normed.cost(5).flops_executed == plain.cost(5).flops_executed > normed.cost(5).flops
    assert float(normed.auxiliary(large, X)) == float(plain.auxiliary(weights, X))


def test_costs_are_those_of_the_active_experts():
    bound, _ = drawn()
    one = structmat.parse("block_tensor_train(rank=1, order='blocked')").bind(IN, OUT)
    found = bound.cost(10)
    assert found.flops == 2 * one.cost(10).flops + 2 * 10 * IN * 4
    assert found.flops_executed == 4 * one.cost(10).flops + 2 * 10 * IN * 4
    assert found.params == 4 * one.params + 4 * IN


def test_every_expert_starts_and_learns_as_one_of_rank_one():
    bound, _ = drawn(experts=8)
    one = structmat.parse("block_tensor_train(rank=1, order='blocked')").bind(IN, OUT)
    for name in "RL":
        ours, its = bound.leaves()[name], one.leaves()[name]
        assert (ours.std, ours.fan_in, ours.share, ours.axes) == (its.std, its.fan_in, its.share, its.axes)
    assert bound.leaves(gain=0.0)["L"].std == 0 < bound.leaves(gain=0.0)["R"].std


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("btt_moe(experts=2, active=3)", "active=3 must be at most experts=2"),
        ("btt_moe()", "experts"),
        ("btt_moe(experts=4, balance=-1.0)", "balance must not be negative"),
    ],
)
def test_refused(text, message):
    with pytest.raises(StructureError, match=message):
        structmat.parse(text).bind(IN, OUT)


def test_it_is_no_matrix():
    bound, params = drawn()
    for call in (
        lambda: bound.materialize(params),
        lambda: bound.project(jnp.zeros((IN, OUT))),
        lambda: bound.rmatmul(params, X),
    ):
        with pytest.raises(StructureError, match="is not a matrix"):
            call()


def test_its_term_has_a_place_or_is_refused():
    layer = lambda text, **more: StructuredDense(OUT, structure=text, **more)
    for text in ("btt_moe(experts=4)", "low_rank(rank=2) + btt_moe(experts=4)"):
        model = layer(text)
        variables = model.init(jax.random.key(0), X)
        assert AUXILIARY not in variables
        _, sown = model.apply(variables, X, mutable=[AUXILIARY])
        (found,) = jax.tree.leaves(sown)
        assert float(found) == pytest.approx(0.01 * (4 / 4 + 0.1 * np.log(4) ** 2), rel=1e-4)  # a gate of zeros
    for text in ("scaled(btt_moe(experts=4), s=2.0)", "bottleneck(dense(), btt_moe(experts=4), inner=8) + dense()"):
        with pytest.raises(StructureError, match=r"has no place here.*balance=0.0 leaves it out"):
            layer(text).init(jax.random.key(0), X)
    with pytest.raises(StructureError, match="has no place here"):
        StructuredEmbed(IN, OUT, structure="btt_moe(experts=4)").init(jax.random.key(0), jnp.arange(3))
    free = layer("scaled(btt_moe(experts=4, balance=0.0), s=2.0)")
    assert free.apply(free.init(jax.random.key(0), X), X).shape == (5, 2, OUT)
