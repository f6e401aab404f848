"""Sites get other structures: the function stays where it can, members of a class stay, and all else keeps its bits."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

import structmat
from structmat.models import MLP
from structmat.models.stack import apply_layers
from structmat.nn import StructuredDense, assign, pick, site_params, sites
from structmat.structures import StructureError, parse
from structmat.surgery import by_layer, changed_params, reassign, restructure, restructured
from tests.marks import mostly_long

X = jax.random.normal(jax.random.key(9), (5, 16))


def unboxed(model, example, seed=0):
    found = nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed), example))
    return {"params": found["params"], "frozen": found.get("frozen", {})}


def mlp(structure, seed=0):
    model = assign(MLP(classes=4, width=16, depth=2), structure, X)
    return model, unboxed(model, X, seed)


def operate(model, variables, rules, example, key=None):
    """(model, variables, changes) after these rules."""
    return restructured(model, rules, variables, example, key=key)


FAMILIES = [
    "monarch(blocks=4)",
    "low_rank(rank=3) + random_sparse(density=0.2)",
    "frozen(dense()) + low_rank(rank=2)",
    "kronecker(terms=2)",
    "weight_norm(monarch(blocks=2))",
    "masked(dense(), n_m_sparse(2, 4), rule='sr_ste')",
    "block_tensor_train(rank=2, order='blocked')",
    "transpose(low_rank(rank=2)) @ diagonal()",
    "circulant()",
    "butterfly()",
    "householder(reflections=4)",
    "identity()",
    "quantized(bits=4, group=8)",
]


@pytest.mark.parametrize("structure", mostly_long(FAMILIES, FAMILIES[1:2]))
def test_made_dense_it_is_the_same_function(structure):
    model, variables = mlp(structure)
    new, dense, changes = operate(model, variables, "dense()", X)
    assert set(changes) == {f"layers_{i}" for i in range(2)} and all(c.error == 0 for c in changes.values())
    assert {c.params_after for c in changes.values()} == {256}
    np.testing.assert_allclose(new.apply(dense, X), model.apply(variables, X), rtol=1e-5, atol=1e-5)
    assert not dense["frozen"]
    for name in ("head/kernel", "head/bias", "layers_0/bias", "layers_1/bias"):
        assert by_layer(dense["params"])[name][0] is by_layer(variables["params"])[name][0]


MEMBERS = ["monarch(blocks=4)", "low_rank(rank=3)", "kronecker(terms=2)", "block_tensor_train(rank=2, order='blocked')"]


@pytest.mark.long
@pytest.mark.parametrize("structure", MEMBERS)
def test_a_dense_member_of_a_class_stays(structure):
    model, variables = mlp(structure)
    whole, dense, _ = operate(model, variables, "dense()", X)
    again, back, changes = operate(whole, dense, structure, X)
    assert max(c.error for c in changes.values()) < 1e-5
    np.testing.assert_allclose(again.apply(back, X), model.apply(variables, X), rtol=1e-4, atol=1e-4)


def test_what_a_projection_loses_is_what_it_reports():
    model, variables = mlp("dense()")
    _, sparse, changes = operate(model, variables, "monarch(blocks=4)", X)
    for path, change in changes.items():
        w = variables["params"][path]["kernel"]
        best = structmat.project(w, "monarch(blocks=4)")
        assert change.error == pytest.approx(float(best.error(w)), rel=1e-4) and change.error > 0.3
        assert (change.params_before, change.params_after) == (256, 128)
        table = sites(reassign(model, "monarch(blocks=4)", X), X)
        held = table[path].bound.materialize(site_params(sparse, path, table[path]))
        np.testing.assert_allclose(held, best.materialize(), rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A norm and a residual layer with a bias."""

    structures: tuple = ()

    @nn.compact
    def __call__(self, x):
        up = StructuredDense(16, structure=pick(self.structures, "up"), name="up")
        return x + up(nn.LayerNorm(name="norm")(x)), None


class Tower(nn.Module):
    """Three of them, scanned where they are equal."""

    structures: tuple = ()
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        return apply_layers(Block, {}, x, structures=self.structures, layers=3, scan=self.scan)


def bits(variables, but):
    """Layer path -> bytes, of all leaves but some."""
    return {
        path: np.asarray(a if i is None else a[i]).tobytes()
        for path, (a, i) in by_layer(variables).items()
        if not path.endswith(tuple(but))
    }


def test_one_layer_leaves_its_scanned_group_and_comes_back():
    model = assign(Tower(), "monarch(blocks=2)", X)
    variables = unboxed(model, X)
    assert set(variables["params"]) == {"layers_0to2"}
    apart, split, changes = operate(model, variables, {"layers_1/up": "dense()"}, X)
    assert set(split["params"]) == {"layers_0", "layers_1", "layers_2"} and list(changes) == ["layers_1/up"]
    assert changed_params(sites(apart, X), changes) == {"layers_1/up/kernel"}
    weights = [f"layers_1/up/{leaf}" for leaf in ("L", "R", "kernel")]
    kept = bits(variables, weights)
    assert bits(split, weights) == kept and {"params/layers_1/up/bias", "params/layers_0/up/L"} < set(kept)
    expected = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(jax.jit(apart.apply)(split, X), expected, rtol=1e-5, atol=1e-5)

    _, back, changes = operate(apart, split, "layers_1/.* -> monarch(blocks=2)", X)
    assert set(back["params"]) == {"layers_0to2"} and changes["layers_1/up"].error < 1e-5
    assert bits(back, weights) == kept
    np.testing.assert_allclose(jax.jit(model.apply)(back, X), expected, rtol=1e-4, atol=1e-4)


def test_supports_are_drawn_from_the_key_and_differ_by_site():
    model, variables = mlp("dense()")
    draw = lambda key: operate(model, variables, "random_sparse(density=0.25)", X, key)[1]["frozen"]
    one, other = draw(jax.random.key(1)), draw(jax.random.key(2))
    rows = lambda frozen, layer: next(np.asarray(a) for a in jax.tree.leaves(frozen[layer]))
    assert (rows(one, "layers_0") != rows(other, "layers_0")).any()
    assert (rows(one, "layers_0") != rows(one, "layers_1")).any()


def test_frozen_leaves_change_their_collection():
    model, variables = mlp("dense()")
    new, found, _ = operate(model, variables, "layers_1 -> frozen(dense()) + low_rank(rank=2)", X)
    assert np.array_equal(jax.tree.leaves(found["frozen"])[0], variables["params"]["layers_1"]["kernel"])
    np.testing.assert_allclose(new.apply(found, X), model.apply(variables, X), rtol=1e-5, atol=1e-5)


def test_what_surgery_refuses():
    model, variables = mlp("dense()")
    table = sites(model, X)
    with pytest.raises(StructureError, match=r"rule 'layer_1' matches no site; near: layers_1"):
        reassign(model, {"layer_1": "monarch(blocks=4)"}, X)
    with pytest.raises(StructureError, match=r"site layers_0: monarch: blocks=3 does not fit"):
        reassign(model, "monarch(blocks=3)", X)
    less = {path: site for path, site in table.items() if path != "layers_1"}
    with pytest.raises(StructureError, match=r"site layers_1: .* after: no such site"):
        restructure(table, less, variables, variables)
    wide = sites(MLP(classes=4, width=24, depth=2), X)
    with pytest.raises(StructureError, match=r"site head: surgery keeps paths and sizes.*\(16,\).*\(24,\)"):
        restructure(table, wide, variables, variables)
    waves = {**table, "layers_0": dataclasses.replace(table["layers_0"], bound=parse("fourier()").bind(16, 16))}
    with pytest.raises(StructureError, match=r"site layers_0: a complex matrix has no real structure"):
        restructure(waves, table, variables, variables)
    with pytest.raises(StructureError, match=r"site layers_0: block_sparse.*key"):
        operate(model, variables, "block_sparse(block=(4, 4), density=0.5)", X)
