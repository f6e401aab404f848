"""Equivariant bilinear layers, against explicit sums in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn.tensor_product import (
    MODES,
    TensorProduct,
    cp_flops,
    cp_product,
    path_flops,
    path_product,
    plain_flops,
    plain_product,
)
from structmat.structures import StructureError
from structmat.structures.clebsch_gordan import path_tensor, paths, wigner
from structmat.structures.path_factors import PathFactors
from tests.marks import mostly_long
from tests.structures.flops import count_flops

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TURN = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
TURN = TURN * np.linalg.det(TURN)
EXACT = PathFactors.exact(2, 1, 2)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def inputs(mode, left=2, right=1, rows=3):
    u, v = 4, 4 if MODES[mode][1] == "u" else 2
    shape = [{"u": 4, "v": 2, "w": 5}[c] for c in MODES[mode][2]]
    draw = lambda *s: jnp.asarray(RNG.normal(size=s))
    return draw(rows, u, (left + 1) ** 2), draw(rows, v, (right + 1) ** 2), draw(*shape)


def explicit(tensor, x, y, weights, mode):
    a, b, c, d = MODES[mode]
    return np.einsum(f"n{a}i,n{b}j,ijk,{c}->n{d}k", x, y, tensor, weights)


def layer(mode, **fields):
    features = 5 if "w" in mode else None
    return TensorProduct(out=2, mode=mode, features=features, param_dtype=jnp.float64, **fields)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_their_sums(mode):
    """Plain and by exact factors alike, the weights the layer's own or given per row."""
    x, y, weights = inputs(mode)
    expected = explicit(path_tensor(2, 1, 2), x, y, weights, mode)
    plain, cp = layer(mode), layer(mode, factors=EXACT)
    held = {"params": {"weights": weights}}
    np.testing.assert_allclose(plain.apply(held, x, y), expected, atol=1e-12)
    frozen = {f"factor_{name}": jnp.asarray(core) for name, core in zip(("x", "y", "out"), EXACT.cores)}
    np.testing.assert_allclose(cp.apply(held | {"frozen": frozen}, x, y), expected, atol=1e-12)
    each = jnp.stack([weights, 2 * weights, -weights])
    scaled = expected * np.array([1, 2, -1])[:, None, None]
    np.testing.assert_allclose(plain.apply({}, x, y, each), scaled, atol=1e-12)
    np.testing.assert_allclose(cp.apply({"frozen": frozen}, x, y, each), scaled, atol=1e-12)


@pytest.mark.parametrize("mode", mostly_long(["uvu", "uuw"], ["uvu"]))
def test_paths_with_their_own_weights(mode):
    """A sum over paths, and with equal weights the shared form; degrees no path reaches are zero."""
    x, y, weights = inputs(mode)
    count = len(paths(2, 1, 2))
    own = jnp.asarray(RNG.normal(size=(count, *weights.shape)))
    units = np.eye(count)
    expected = sum(explicit(path_tensor(2, 1, 2, units[p]), x, y, own[p], mode) for p in range(count))
    found = layer(mode, shared=False).apply({"params": {"weights": own}}, x, y)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    equal = jnp.broadcast_to(weights, own.shape)
    np.testing.assert_allclose(
        path_product(x, y, equal, mode, 2), explicit(path_tensor(2, 1, 2), x, y, weights, mode), atol=1e-12
    )
    lone = path_product(x[..., :1], y[..., :1], equal[:1], mode, 1)
    assert lone[..., 0].any() and not lone[..., 1:].any() and lone.shape[-1] == 4


@pytest.mark.parametrize("shared", [True, False])
def test_the_plain_layer_is_equivariant(shared):
    """Turning both inputs turns the output, to 1e-10; a CP that misses the tensor does not keep that."""
    x, y, _ = inputs("uvu", 3, 3)
    d = jnp.asarray(wigner(3, TURN))
    module = TensorProduct(mode="uvu", shared=shared, param_dtype=jnp.float64)
    held = module.init(KEY, x, y)
    turned = module.apply(held, x @ d.T, y @ d.T)
    np.testing.assert_allclose(turned, module.apply(held, x, y) @ d.T, atol=1e-10)
    assert np.abs(turned).max() > 0.1
    if shared:
        exact = PathFactors.exact(3, 3, 3)
        missing = PathFactors(exact.degrees, tuple(core[:, ::2] for core in exact.cores))
        rough = TensorProduct(mode="uvu", factors=missing, param_dtype=jnp.float64)
        held = rough.init(KEY, x, y)
        assert np.abs(rough.apply(held, x @ d.T, y @ d.T) - rough.apply(held, x, y) @ d.T).max() > 1e-2


@pytest.mark.long
def test_gradients_are_those_of_the_plain_path():
    """Of weights and both inputs, by exact factors and path by path."""
    x, y, weights = inputs("uvu")
    target = jnp.asarray(RNG.normal(size=(3, 4, 9)))
    tensor, cores = jnp.asarray(path_tensor(2, 1, 2)), [jnp.asarray(core) for core in EXACT.cores]
    by = {
        "plain": lambda x, y, w: plain_product(tensor, x, y, w, "uvu"),
        "cp": lambda x, y, w: cp_product(cores, x, y, w, "uvu"),
        "paths": lambda x, y, w: path_product(x, y, jnp.broadcast_to(w, (len(paths(2, 1, 2)), *w.shape)), "uvu", 2),
    }
    slope = lambda f: jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)) * target), argnums=(0, 1, 2))(x, y, weights)
    plain = slope(by["plain"])
    for name in ("cp", "paths"):
        for found, expected in zip(slope(by[name]), plain):
            np.testing.assert_allclose(found, expected, atol=1e-10)
    step = 1e-6 * jnp.ones_like(weights)
    value = lambda w: jnp.sum(jnp.sin(by["plain"](x, y, w)) * target)
    numeric = (value(weights + step) - value(weights - step)) / 2e-6
    assert float(plain[2].sum()) == pytest.approx(float(numeric), rel=1e-6)


def test_parameters_and_their_size():
    """Factors are frozen and not counted; a path has weights of its own only where they are not shared."""
    x, y = jnp.ones((2, 4, 9)), jnp.ones((2, 3, 4))
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    shapes = lambda **fields: jax.eval_shape(TensorProduct(**fields).init, KEY, x, y)
    assert count(shapes(mode="uvu")["params"]) == 4 * 3
    assert count(shapes(mode="uvw", features=5)["params"]) == 4 * 3 * 5
    assert count(shapes(mode="uvu", shared=False)["params"]) == len(paths(2, 1, 2)) * 4 * 3
    held = shapes(mode="uvu", factors=EXACT)
    assert count(held["params"]) == 12 and count(held["frozen"]) == EXACT.rank * (9 + 4 + 9)
    assert "params" not in jax.eval_shape(TensorProduct(factors=EXACT).init, KEY, x, y, jnp.ones((4, 3)))
    wide = TensorProduct(mode="uvw", features=500).init(KEY, x, y)["params"]["weights"]
    assert float(wide.std()) == pytest.approx(12**-0.5, rel=0.05) and wide.dtype == jnp.float32


def test_dtype_of_the_computation():
    x, y = jnp.ones((2, 4, 9), jnp.bfloat16), jnp.ones((2, 3, 4), jnp.bfloat16)
    module = TensorProduct(factors=EXACT, dtype=jnp.bfloat16)
    held = module.init(KEY, x, y)
    assert module.apply(held, x, y).dtype == jnp.bfloat16 and held["frozen"]["factor_x"].dtype == jnp.float32
    assert TensorProduct().apply({"params": held["params"]}, x, y).dtype == jnp.float32


def test_flops_are_those_of_the_programs():
    """Products without a sum are a `dot_general` too, for which the counter takes 2 per entry: all but the GEMMs twice."""
    x, y, weights = jnp.ones((7, 9)), jnp.ones((7, 4)), jnp.ones(7)
    tensor, cores = jnp.ones((9, 4, 9)), [jnp.ones((n, 6)) for n in (9, 4, 9)]
    per = lambda f, *a: count_flops(f, *a) / 7
    plain, cp, separate = 2 * 9 * 4 * 9, 2 * 6 * (9 + 4 + 9), 0
    for l1, l2, l3 in paths(2, 1, 2):
        separate += 2 * (2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1)
    assert per(lambda *a: plain_product(*a, "uuu"), tensor, x, y, weights) == 2 * plain_flops((9, 4, 9)) - plain
    assert per(lambda *a: cp_product(*a, "uuu"), cores, x, y, weights) == 2 * cp_flops((9, 4, 9), 6) - cp
    own = jnp.ones((len(paths(2, 1, 2)), 7))
    assert per(lambda *a: path_product(*a, "uuu", 2), x, y, own) == 2 * path_flops(2, 1, 2) - separate
    assert cp_flops((9, 9, 9), 28) - 2 * 28 == 2 * 756 and plain_flops((9, 9, 9)) - 90 == 2 * 729


@pytest.mark.parametrize(
    ("fields", "x", "y", "weights", "message"),
    [
        ({"mode": "uwu"}, (4, 9), (3, 4), None, "no mode 'uwu'; did you mean"),
        ({"mode": "uuu"}, (4, 9), (3, 4), None, "mode uuu needs as many channels in y as in x, got 3 and 4"),
        ({"mode": "uvw"}, (4, 9), (3, 4), None, "mode uvw needs features"),
        ({"features": 4}, (4, 9), (3, 4), None, "mode uvu takes no features, got features=4"),
        ({}, (4, 8), (3, 4), None, r"8 entries are not \(l\+1\)\^2"),
        ({}, (4, 9), (3, 4), (3, 4), r"weights of shape \(3, 4\) must end in \(4, 3\)"),
        ({"shared": False}, (4, 9), (3, 4), (4, 3), r"weights of shape \(4, 3\) must end in \(9, 4, 3\)"),
        ({"factors": EXACT, "shared": False}, (4, 9), (3, 4), None, "shared weights, got degrees .*shared=False"),
        ({"factors": EXACT, "out": 1}, (4, 9), (3, 4), None, r"factors of degrees \(2, 1, 2\) need .* got degrees \(2, 1, 1\)"),
    ],
)  # fmt: skip
def test_refusals(fields, x, y, weights, message):
    weights = None if weights is None else jnp.ones(weights)
    with pytest.raises(StructureError, match=message):
        jax.eval_shape(TensorProduct(**fields).init, KEY, jnp.ones(x), jnp.ones(y), weights)
