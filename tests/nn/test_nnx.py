"""Modules for flax.nnx against the Linen ones: same draws, bits and gradients both ways, under nnx's transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from structmat import nn as faces
from structmat.nn import nnx as ours
from structmat.structures import StructureError
from tests.marks import mostly_long

KEY = jax.random.key(3)
SUM = "frozen(monarch(blocks=2)) + low_rank(rank=2, train=('b',))"
SPARSE = "low_rank(rank=2) + random_sparse(density=0.3)"
DENSE = {
    name: (ours.StructuredDense, faces.StructuredDense, (8, 12), (12,), dict(structure=text), (3, 8))
    for name, text in {
        "low_rank": "low_rank(rank=3)",
        "frozen_term": SUM,
        "indices": SPARSE,
        "quantized": "frozen(quantized(bits=4, group=8)) + low_rank(rank=2)",
    }.items()
}
CASES = DENSE | {
    "no_leaves": (ours.StructuredDense, faces.StructuredDense, (8, 8), (8,), dict(structure="dct()", use_bias=False), (3, 8)),
    "general": (
        ours.StructuredDenseGeneral,
        faces.StructuredDenseGeneral,
        ((4, 6), [2, 8]),
        ((2, 8),),
        dict(structure="low_rank(rank=2)", in_axes=("heads", None)),
        (3, 4, 6),
    ),
    "conv": (
        ours.StructuredConv,
        faces.StructuredConv,
        (4, 6, [3, 3]),
        (6, (3, 3)),
        dict(structure="low_rank(rank=2)", view="spatial", padding="VALID", kernel_dilation=2),
        (2, 8, 7, 4),
    ),
    "spectral": (ours.SpectralConv, faces.SpectralConv, (3, 4, (4, 3)), (4, (4, 3)), dict(structure="cp(rank=2)"), (2, 6, 5, 3)),
    "transform": (ours.MonarchTransform, faces.MonarchTransform, (12,), (12,), dict(path="factored"), (2, 12)),
}  # fmt: skip
"""nnx module, Linen module, their arguments, fields of both, shape of x."""
QUICK = ("frozen_term",)


def made(name):
    """(nnx module, Linen module, what Linen draws from the same key, x)."""
    own, face, args, linen_args, fields, shape = CASES[name]
    x = jax.random.normal(KEY, shape)
    linen = face(*linen_args, **(fields | ({"axis": (-2, -1)} if name == "general" else {})))
    return own(*args, **fields, rngs=nnx.Rngs(7)), linen, nn.unbox(linen.init(nnx.Rngs(7).params(), x)), x


def same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def real(y):
    return jnp.sum(jnp.sin(jnp.abs(y)))


@pytest.mark.parametrize("name", mostly_long([*CASES], QUICK))
def test_draws_outputs_and_gradients_are_those_of_linen(name):
    module, linen, variables, x = made(name)
    same(ours.to_linen(module), variables)
    params = variables.get("params", {})
    of_linen = jax.jit(jax.value_and_grad(lambda p, rest, x: real(linen.apply({**rest, "params": p}, x))))
    of_nnx = nnx.jit(nnx.value_and_grad(lambda m, x: real(m(x))))
    (value, gradient), (other, other_gradient) = of_linen(params, variables, x), of_nnx(module, x)
    assert float(value) == float(other) and jnp.isfinite(value)
    same(nnx.to_pure_dict(other_gradient), gradient)
    same(nnx.jit(lambda m, x: m(x))(module, x), jax.jit(linen.apply)(variables, x))
    assert module.bound == module.site.bound and {v for v in variables} <= {"params", "frozen"}


@pytest.mark.parametrize("name", mostly_long([*CASES], ["indices"]))
def test_variables_of_linen_go_in_and_come_out(name):
    module, linen, start, x = made(name)
    boxed = linen.init(jax.random.key(11), x)
    same(ours.to_linen(nnx.merge(*nnx.split(module))), start)
    ours.from_linen(module, boxed)
    held = nn.unbox(boxed)
    same(ours.to_linen(module), held)
    same(jax.jit(lambda x: module(x))(x), jax.jit(lambda x: linen.apply(held, x))(x))
    graph, params, frozen = nnx.split(module, nnx.Param, ours.Frozen)
    same(*(ours.to_linen(nnx.merge(graph, *parts)) for parts in ((params, frozen), (frozen, params))))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(held.get("params", {})))


@pytest.mark.parametrize("text", mostly_long(["dense()", "low_rank(rank=2) + random_sparse(density=0.2)"], ["dense()"]))
def test_embedding_takes_rows_and_attends(text):
    module = ours.StructuredEmbed(10, 6, structure=text, rngs=nnx.Rngs(params=5))
    linen, ids = faces.StructuredEmbed(10, 6, structure=text), jnp.array([[1, 9], [0, 1]])
    variables = nn.unbox(linen.init(nnx.Rngs(params=5).params(), ids))
    same(ours.to_linen(module), variables)
    rows = module(ids)
    same(rows, linen.apply(variables, ids))
    same(module.attend(rows), linen.apply(variables, rows, method="attend"))


class MLP(nnx.Module):
    """Two layers, as nnx holds several."""

    def __init__(self, rngs):
        self.layers = nnx.List([ours.StructuredDense(8, 8, structure=text, rngs=rngs) for text in (SUM, SPARSE)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


@pytest.mark.long
def test_an_optimiser_of_nnx_trains_params_and_nothing_frozen():
    model, x = MLP(nnx.Rngs(0)), jax.random.normal(KEY, (16, 8))
    before = jax.device_get(ours.to_linen(model))
    assert set(before["params"]["layers"]) == {"0", "1"} and before["frozen"]["layers"]["1"]
    optimiser = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser, x):
        value, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimiser.update(model, gradient)
        return value

    losses = [float(step(model, optimiser, x)) for _ in range(10)]
    after = ours.to_linen(model)
    assert losses[-1] < 0.9 * losses[0]
    same(after["frozen"], before["frozen"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after["params"], before["params"])
    assert all(jax.tree.leaves(moved))
    other = MLP(nnx.Rngs(1))
    ours.from_linen(other, after)
    same(other(x), model(x))


@pytest.mark.long
def test_vmap_makes_and_applies_an_ensemble():
    make = lambda rngs: ours.StructuredDense(8, 12, structure=SUM, rngs=rngs)
    split = nnx.split_rngs(splits=3)
    ensemble = split(nnx.vmap(make))(nnx.Rngs(0))
    x = jax.random.normal(KEY, (3, 2, 8))
    y = nnx.vmap(lambda m, x: m(x))(ensemble, x)
    held = ours.to_linen(ensemble)
    assert {a.shape[0] for a in jax.tree.leaves(held)} == {3} and jnp.ptp(held["frozen"]["0"]["R"], 0).max() > 0
    linen = faces.StructuredDense(12, structure=SUM)
    np.testing.assert_allclose(y, jax.vmap(linen.apply)(held, x), rtol=1e-6)


def test_axes_are_kept_and_what_does_not_fit_is_refused():
    module = ours.StructuredDense(
        8, 12, structure="low_rank(rank=3)", in_axes="embed", out_axes="mlp", rngs=nnx.Rngs(0)
    )
    assert (module.a.axes, module.b.axes, module.bias.axes) == (("rank", "embed"), ("rank", "mlp"), ("mlp",))
    held = ours.to_linen(module)
    before = jax.device_get(held)
    wrong = [
        ({**held["params"], "c": held["params"]["a"]}, "params/c is no leaf of the module"),
        ({n: v for n, v in held["params"].items() if n != "bias"}, "params/bias of the module is not among"),
        (
            {**held["params"], "b": held["params"]["b"][:, :3]},
            r"params/b is float32 \(3, 12\), and .* float32 \(3, 3\)",
        ),
        ({**held["params"], "b": held["params"]["b"].astype(jnp.bfloat16)}, "params/b is float32 .* bfloat16"),
    ]
    for params, message in wrong:
        with pytest.raises(ValueError, match=message):
            ours.from_linen(module, {"params": jax.tree.map(lambda a: a + 1, params)})
    same(ours.to_linen(module), before)
    with pytest.raises(StructureError, match="adds to the loss"):
        ours.StructuredDense(8, 8, structure="btt_moe(experts=2)", rngs=nnx.Rngs(0))
    with pytest.raises(StructureError, match="path must be one of"):
        ours.StructuredDense(8, 8, path="fast", rngs=nnx.Rngs(0))
