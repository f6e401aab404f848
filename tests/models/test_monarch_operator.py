"""Learned transforms: exact at the start, trained, and found as sites."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models.fno import FNO
from structmat.models.monarch_operator import MonarchOperator, MonarchSpectralConv
from structmat.nn import assign, sites
from structmat.nn.spectral_conv import SpectralConv
from structmat.structures import parse
from tests.marks import mostly_long

X = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)
FIELDS = dict(width=4, layers=1, modes=(4, 3))


def without_transforms(tree):
    """The parameters that an FNO has too."""
    named = lambda k: k.startswith(("forward_", "inverse_"))
    return {k: without_transforms(v) if isinstance(v, dict) else v for k, v in tree.items() if not named(k)}


@pytest.mark.parametrize(
    ("space", "modes", "transform"),
    mostly_long(
        [((8, 6), (4, 6), None), ((9, 8), (5, 3), None), ((12,), (7,), "dense()"), ((16,), (16,), "monarch(blocks=4)")],
        [((16,), (16,), "monarch(blocks=4)")],
    ),
)
def test_starts_as_the_fourier_layer(space, modes, transform):
    x = np.random.default_rng(1).normal(size=(2, *space, 3)).astype(np.float32)
    layer = MonarchSpectralConv(4, modes, "cp(rank=3)", transform=transform)
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
    assert {k for k in params if "_" in k} == {f"{d}_{k}" for d in ("forward", "inverse") for k in range(len(space))}
    expected = SpectralConv(4, modes, "cp(rank=3)").apply({"params": without_transforms(params)}, x)
    got = layer.apply({"params": params}, x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.long
def test_operator_starts_as_the_fno_and_trains_its_transforms():
    model = MonarchOperator(**FIELDS)
    params = nn.unbox(model.init(jax.random.key(0), X))["params"]
    expected = jax.jit(FNO(**FIELDS).apply)({"params": without_transforms(params)}, X)
    loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, X)))
    got, grads = jax.jit(lambda p: (model.apply({"params": p}, X), jax.grad(loss)(p)))(params)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), grads["layers_0"]["spectral"])
    assert norms["forward_0"]["R"] > 0 and norms["inverse_1"]["L"] > 0 and norms["kernel"] > 0


def test_transforms_are_sites():
    """A rule wins over the field `transform`, the field over what no rule matches; both survive a checkpoint's table."""
    x = jax.ShapeDtypeStruct((2, 16, 6, 3), jnp.float32)
    plain = sites(MonarchOperator(**FIELDS), x)
    paths = [f"layers_0/spectral/{d}_{k}" for d in ("forward", "inverse") for k in (0, 1)]
    assert [p for p in plain if p.startswith("layers_0/spectral/")] == paths
    assert plain[paths[0]].bound.params == 2 * 2 * 16 * 4  # n (4 + 4) complex entries of n = 16
    model = MonarchOperator(**FIELDS, transform="dense()")
    model = assign(model, "layers_0/spectral -> cp(rank=2); .*/inverse_0 -> monarch(blocks=4)", x)
    table = sites(model, x)
    names = {p: table[p].bound.structure.name for p in ("layers_0/spectral", *paths)}
    assert list(names.values()) == ["cp", "dense", "dense", "monarch", "dense"]
    again = model.clone(structures=tuple((p, parse(str(s.bound.structure))) for p, s in table.items()))
    assert sites(again, x) == table
