"""U-Net: shapes, symmetry, sizes and rules."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import FieldResNet, UNet
from structmat.nn import assign, sites

X = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


@pytest.mark.long
def test_shifts_by_whole_cells_pass_through_periodic_padding():
    """2^depth points, which every mean and repetition respects; zero padding breaks it."""
    for padding, same in (("CIRCULAR", True), ("SAME", False)):
        model = UNet(features=2, width=4, depth=2, padding=padding)
        variables = model.init(jax.random.key(0), X)
        apply = jax.jit(model.apply)
        y, rolled = apply(variables, X), apply(variables, np.roll(X, (4, -4), (1, 2)))
        assert y.shape == (2, 8, 12, 2) and y.dtype == jnp.float32 and jnp.std(y) > 1e-2
        assert (np.abs(rolled - np.roll(y, (4, -4), (1, 2))).max() < 1e-4 * np.abs(y).max()) == same


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (6, 3)])
def test_parameters_have_their_closed_form(width, depth):
    x = jax.ShapeDtypeStruct((1, 8, 16, 3), jnp.float32)
    model = UNet(features=2, width=width, depth=depth)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x))["params"]
    conv = lambda a, b, area=9: area * a * b + b
    double = lambda a, b: conv(a, b) + conv(b, b) + 4 * b
    widths = [width * 2**i for i in range(depth + 1)]
    expected = sum(double(a, b) for a, b in zip([3, *widths], widths))
    expected += sum(conv(b, a) + double(2 * a, a) for a, b in itertools.pairwise(widths)) + conv(width, 2, 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_rules_reach_its_convolutions():
    model = assign(UNet(width=4, depth=1), "(down_0|merge_0)/conv. -> low_rank(rank=2)", X)
    table = sites(model, X)
    assert {site.kind for site in table.values()} == {"conv"}
    assert {p for p, s in table.items() if s.bound.structure.name == "low_rank"} == {
        f"{block}_0/conv{i}" for block in ("down", "merge") for i in (1, 2)
    }
    assert table["merge_0/conv1"].bound.in_shape == (3, 3, 8) and {"middle/conv1", "up_0", "head"} < set(table)


@pytest.mark.long
def test_residual_and_checks():
    x = X[..., :2]
    fields = dict(features=2, width=4, depth=1)
    variables = UNet(**fields).init(jax.random.key(0), x)
    plain, added = (UNet(**fields, residual=r).apply(variables, x) for r in (False, True))
    np.testing.assert_allclose(added, plain + x, atol=1e-6)
    for model, message in (
        (UNet(depth=3), "divisible by 8"),
        (UNet(padding="circular"), "CIRCULAR, SAME"),
        (UNet(depth=1, residual=True), "3 channels to features=1"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), X)


@pytest.mark.parametrize("model", [UNet(width=4, depth=1), FieldResNet(width=4, blocks=1)], ids=["unet", "resnet"])
def test_coordinates_tell_where_a_point_is(model):
    """Without them the output moves with the input, and an even input has an even output whatever the parameters."""
    x = jnp.ones((1, 8, 8, 1))
    spread = {}
    for grid in (False, True):
        own = model.clone(grid=grid)
        params = jax.tree.map(lambda a: a + 0.1, nn.unbox(jax.jit(own.init)(jax.random.key(0), x)))
        spread[grid] = float(jnp.ptp(jax.jit(own.apply)(params, x)))
    assert spread[False] < 1e-5 < 1e-2 < spread[True]
