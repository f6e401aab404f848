"""Structured convolutions equal one convolution with the materialised kernel, on every path."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import PROBE, StructuredConv, sites
from structmat.structures import StructureError, parse
from structmat.structures.convolution import kernel_of, matrix_of, view_shapes
from tests.marks import mostly_long

KEY = jax.random.key(0)
CIN, COUT, WINDOW = 6, 8, (3, 2)
FACTORED = [
    ("dense()", "channel"),
    ("low_rank(rank=3)", "channel"),
    ("low_rank(rank=3)", "spatial"),
    ("low_rank(rank=3)", "decoupled"),
    ("spectral(rank=3)", "spatial"),
    ("block_low_rank(in_blocks=1, out_blocks=8, rank=2)", "decoupled"),
    ("block_low_rank(in_blocks=2, out_blocks=4, rank=2)", "channel"),
    ("monarch(blocks=2)", "channel"),
    ("kronecker()", "channel"),
    ("tensor_train(rank=2)", "channel"),
    ("tucker(rank=2, modes=1)", "channel"),
    ("tucker(rank=(2, 1, 3, 2, 2))", "channel"),
    ("cp(rank=3)", "channel"),
    ("random_sparse(density=0.25)", "channel"),
    ("low_rank(rank=2) + scaled(frozen(low_rank(rank=1)), s=2.0)", "spatial"),
]
PLACES = [
    dict(),
    dict(padding="VALID", strides=2),
    dict(padding="CIRCULAR", kernel_dilation=2),
    dict(padding=((2, 1), (0, 3)), strides=(1, 3)),
]


def held(module, x):
    return nn.unbox(jax.jit(module.init)(KEY, x))


def leaves(variables):
    parts = {**variables.get("frozen", {}), **{n: v for n, v in variables.get("params", {}).items() if n != "bias"}}
    both = set(variables.get("frozen", {})) & set(variables.get("params", {}))
    assert not both
    return parts


def flat(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("text", "view"), mostly_long(FACTORED, FACTORED[::5]))
def test_factored_equals_flax_with_the_materialised_kernel(text, view):
    rng = np.random.default_rng(0)
    x = flat(rng, 2, 9, 7, CIN)
    bound = parse(text).bind(*view_shapes(view, WINDOW, CIN, COUT))
    for place in PLACES[2:] if view == "channel" else PLACES:
        layer = StructuredConv(COUT, WINDOW, text, view, path="factored", **place)
        variables = held(layer, x)
        variables["params"]["bias"] = flat(rng, COUT)
        kernel = kernel_of(bound.materialize(leaves(variables)), view, WINDOW, CIN, COUT)
        reference = nn.Conv(COUT, WINDOW, **place)
        expected = reference.apply({"params": {"kernel": kernel, "bias": variables["params"]["bias"]}}, x)
        np.testing.assert_allclose(layer.apply(variables, x), expected, atol=2e-5, err_msg=str(place))
        through_kernel = StructuredConv(COUT, WINDOW, text, view, path="dense", **place)
        np.testing.assert_allclose(through_kernel.apply(variables, x), expected, atol=2e-5)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes):
    x = flat(np.random.default_rng(1), 2, *(5,) * axes, 4)
    layer = StructuredConv(6, (3,) * axes, "low_rank(rank=2)", path="factored")
    variables = held(layer, x)
    kernel = (variables["params"]["a"].T @ variables["params"]["b"]).reshape(*(3,) * axes, 4, 6)
    expected = nn.Conv(6, (3,) * axes, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


def test_gradients_agree_between_paths():
    x = flat(np.random.default_rng(2), 2, 6, 6, CIN)
    for text, view in (FACTORED[2], FACTORED[5], FACTORED[7]):
        factored, dense = (StructuredConv(COUT, (3, 3), text, view, path=p) for p in ("factored", "dense"))
        variables = held(factored, x)
        slope = lambda layer, variables: jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, x)))))(variables)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
        jax.tree.map(close, slope(factored, variables), slope(dense, variables))


@pytest.mark.parametrize("view", ["channel", "spatial", "decoupled"])
def test_views_are_inverse_and_projection_of_a_trained_kernel_is_optimal(view):
    """Truncating the view's SVD and convolving by factors equals convolving with the truncated kernel."""
    rng = np.random.default_rng(3)
    kernel, x = flat(rng, *WINDOW, CIN, COUT), flat(rng, 2, 5, 5, CIN)
    matrix = matrix_of(kernel, view)
    np.testing.assert_array_equal(kernel_of(matrix, view, WINDOW, CIN, COUT), kernel)
    bound = parse("low_rank(rank=4)").bind(*view_shapes(view, WINDOW, CIN, COUT))
    params = bound.project(matrix)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    truncated = kernel_of(jnp.asarray((u[:, :4] * s[:4]) @ vt[:4]), view, WINDOW, CIN, COUT)
    layer = StructuredConv(COUT, WINDOW, "low_rank(rank=4)", view, use_bias=False, path="factored")
    expected = nn.Conv(COUT, WINDOW, use_bias=False).apply({"params": {"kernel": truncated}}, x)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-4)


def test_cost_is_that_of_the_factor_convolutions():
    """Channels and windows only: the bound's FLOPs per output position are those XLA counts for valid stride-1 windows."""
    x = jnp.zeros((1, 1, 18, 16))
    for view, window in (("channel", (1, 3)), ("decoupled", (1, 1))):
        layer = StructuredConv(32, window, "low_rank(rank=4)", view, use_bias=False, path="factored", padding="VALID")
        variables = held(layer, x)
        counted = jax.jit(layer.apply).lower(variables, x).compile().cost_analysis()["flops"]
        bound = parse("low_rank(rank=4)").bind(*view_shapes(view, window, 16, 32))
        assert counted == pytest.approx(bound.cost(18 - window[1] + 1).flops, rel=0.05)


def test_is_a_site_and_takes_a_probe():
    x = flat(np.random.default_rng(4), 2, 5, 5, CIN)
    layer = StructuredConv(COUT, (3, 3), "low_rank(rank=2)", "spatial", in_axes="embed", out_axes="mlp")
    (site,) = sites(layer, x).values()
    assert site.kind == "conv" and (site.bound.d_in, site.bound.d_out) == (18, 24)
    variables = held(layer, x)
    names = layer.init(KEY, x)["params"]["b"].names
    assert names == ("rank", "mlp")
    weight = flat(np.random.default_rng(5), 18, 24)
    moved = layer.apply({**variables, PROBE: {"weight": weight}}, x)
    kernel = kernel_of(weight, "spatial", (3, 3), CIN, COUT)
    added = nn.Conv(COUT, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(moved, layer.apply(variables, x) + added, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (dict(view="spatail"), (1, 5, 5, 4), "spatail.*did you mean 'spatial'"),
        (dict(view="spatial", kernel_size=3), (1, 5, 4), "splits a two-dimensional window"),
        (dict(view="spatial", structure="monarch(blocks=2)", path="factored"), (1, 5, 5, 4), "no factor convolutions"),
        (dict(padding="SAEM"), (1, 5, 5, 4), "padding must be SAME, VALID, CIRCULAR"),
        (dict(strides=(1, 1, 1)), (1, 5, 5, 4), "one entry for each of 2 spatial axes"),
        (dict(padding="VALID", kernel_size=(7, 7)), (1, 5, 5, 4), "does not fit an input"),
        (dict(), (5, 4), "has no 2 spatial axes"),
        (dict(path="fast"), (1, 5, 5, 4), "path must be one of"),
    ],
)
def test_bad_input(options, shape, message):
    layer = StructuredConv(**({"features": 4, "kernel_size": (3, 3)} | options))
    with pytest.raises(StructureError, match=message):
        layer.init(KEY, jnp.zeros(shape))
