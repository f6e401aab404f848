"""Fourier layers against explicit Fourier sums, their weights against dense tensors, and what sites and rates see of them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import assign, sites
from structmat.nn.sites import bind, pick
from structmat.nn.spectral_conv import SpectralConv, from_low_modes, kept, low_modes
from structmat.optim import multipliers
from structmat.structures import StructureError, parse
from structmat.structures.fourier_weight import bind_fourier_weight
from tests.marks import mostly_long

TEXTS = ["dense()", "tucker(rank=4)", "tucker(rank=(3, 4, 2, 2))", "cp(rank=7)", "tensor_train(rank=5)"]
LARGE = (64, (64, 64, 33))
"""Of the 64 x 64 modes of the authors' baseline."""


def bound_of(text, cin=6, out=(10, 4, 3)):
    return bind_fourier_weight(parse(text), cin, out)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


CASES = [(text, modes) for text in TEXTS for modes in ((9,), (4, 3), (2, 3, 2)) if (",") not in text or len(modes) == 2]


@pytest.mark.parametrize(
    ("text", "modes"), mostly_long(CASES, [c for c in CASES if c[1] == (4, 3) and "4" not in c[0]])
)
def test_contraction_is_that_of_the_tensor(text, modes):
    bound = bound_of(text, 6, (10, *modes))
    params = bound.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, *modes, 6), jnp.complex64)
    w = np.asarray(bound.tensor(params))
    letters = "xyz"[: len(modes)]
    close(bound.contract(params, x), np.einsum(f"b{letters}i,io{letters}->b{letters}o", x, w))
    assert bound.materialize(params).shape == (bound.d_in, bound.d_out) and bound.is_complex
    assert {leaf.dtype for leaf in bound.leaves().values()} == {jnp.complex64}


@pytest.mark.parametrize("text", mostly_long(TEXTS, ["dense()", "tensor_train(rank=5)"]))
def test_entries_start_at_the_size_of_the_paper(text):
    """E|W|^2 = 2 / (cin + cout), here over 300 draws."""
    bound = bound_of(text)
    draw = jax.jit(jax.vmap(lambda key: jnp.mean(jnp.abs(bound.tensor(bound.init(key))) ** 2)))
    std = float(jnp.sqrt(draw(jax.random.split(jax.random.key(0), 300)).mean()))
    assert abs(std / math.sqrt(2 / 16) - 1) < 0.1
    assert bound.std == math.sqrt(2 / 16)


@pytest.mark.parametrize("text", mostly_long(["tucker(rank=4)", "tensor_train(rank=6)", "cp(rank=3)"], []))
def test_a_member_projects_to_itself(text):
    """Full ranks hold every tensor; a tensor of CP rank 2 is found at rank 3."""
    bound = bound_of(text, 3, (4, 3, 2))
    start = bound_of("cp(rank=2)" if "cp" in text else "dense()", 3, (4, 3, 2))
    w = start.materialize(start.init(jax.random.key(2)))
    params = bound.project(w)
    close(bound.materialize(params), w, 1e-3 if "cp" in text else 1e-5)
    x = jax.random.normal(jax.random.key(1), (2, 3, 2, 3), jnp.complex64)
    expected = jnp.einsum("bxyi,ioxy->bxyo", x, w.reshape(3, 4, 3, 2))
    close(bound.contract(params, x), expected, 1e-3 if "cp" in text else 1e-5)


def fourier_sum(x, w, modes):
    """f64: every kept coefficient from its definition, its product, and the real part of the sum of waves."""
    space = x.shape[1:-1]
    signed = lambda m: [*range((m + 1) // 2), *range(-(m // 2), 0)]
    ranges = [*map(signed, modes[:-1]), range(modes[-1] // 2 + 1)]
    grids = np.meshgrid(*map(np.arange, space), indexing="ij")
    out = np.zeros((len(x), *space, w.shape[1]))
    for at in np.ndindex(*map(len, ranges)):
        k = [r[i] for r, i in zip(ranges, at)]
        wave = np.exp(2j * np.pi * sum(f * g / n for f, g, n in zip(k, grids, space)))
        coefficient = (x * wave.conj()[None, ..., None]).mean(tuple(range(1, x.ndim - 1)))
        times = 1 if k[-1] == 0 or 2 * k[-1] == space[-1] else 2
        out += times * (wave[None, ..., None] * (coefficient @ w[(..., *at)])[:, *(None,) * len(space)]).real
    return out


@pytest.mark.parametrize(
    ("space", "modes"),
    mostly_long(
        [((8, 6), (4, 6)), ((9, 8), (5, 3)), ((10,), (7,)), ((8,), (8,)), ((4, 6, 5), (2, 3, 4))], [((8, 6), (4, 6))]
    ),
)
def test_layer_is_its_fourier_sum(space, modes):
    x = np.random.default_rng(0).normal(size=(2, *space, 3))
    layer = SpectralConv(4, modes)
    variables = layer.init(jax.random.key(0), x.astype(np.float32))
    got = layer.apply(variables, x.astype(np.float32))
    w = np.asarray(nn.unbox(variables)["params"]["kernel"], np.complex128)
    assert got.dtype == jnp.float32 and w.shape == (3, 4, *kept(modes))
    close(got, fourier_sum(x, w, modes))


def test_coefficients_there_and_back():
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 3)).astype(np.float32)
    close(from_low_modes(low_modes(x, (6, 5)), (6, 5), (6, 5)), x)


@pytest.mark.long
def test_shifts_pass_through_and_a_finer_grid_gives_the_same_field():
    layer = SpectralConv(2, (5, 4), structure="cp(rank=3)")
    rng = np.random.default_rng(2)
    spectrum = rng.normal(size=(2, 7, 4, 3)) + 1j * rng.normal(size=(2, 7, 4, 3))
    coarse, fine = (from_low_modes(spectrum.astype(np.complex64), (7, 6), s) for s in ((8, 9), (16, 18)))
    variables = layer.init(jax.random.key(0), coarse)
    y = layer.apply(variables, coarse)
    close(layer.apply(variables, jnp.roll(coarse, (3, -2), (1, 2))), jnp.roll(y, (3, -2), (1, 2)))
    close(layer.apply(variables, fine)[:, ::2, ::2], y)
    close(layer.apply(variables, coarse.reshape(2, 1, 8, 9, 3))[:, 0], y)


def test_sizes_and_operations_of_the_card():
    dense = bound_of("dense()", *LARGE)
    assert 4 * dense.params == 69_206_016 and 4 * bound_of("dense()", 64, (64, 64, 32)).params == 67_108_864
    points = 64 * 33
    assert dense.cost(8).flops == 8 * 8 * 64 * 64 * points  # 8 real operations per complex multiply-add
    for rank in (4, 16, 256):  # R M (cin + cout + 1); the order taken may scale a factor once, not every sample
        bound = bound_of(f"cp(rank={rank})", *LARGE)
        each = (bound.cost(9).flops - bound.cost(8).flops) / 8
        assert 128 <= each / (rank * points) <= 129
        assert bound.params == 2 * rank * (64 + 64 + 64 + 33)
    form = bound_of("tucker(rank=(10, 9, 8, 7))", *LARGE)
    assert form.params == 2 * (5040 + 10 * 64 + 9 * 64 + 8 * 64 + 7 * 33)
    each = (form.cost(9).flops - form.cost(8).flops) / 8
    assert each == points * (64 * 10 + 10 * 9 + 9 * 64)
    assert dense.cost(8, path="dense").flops == dense.cost(8).flops_executed


@pytest.mark.parametrize("family", ["tucker", "cp", "tensor_train"])
def test_fit_reaches_its_fraction(family):
    whole = bound_of("dense()", *LARGE).params
    for fraction in (0.1, 0.02, 1 / 150):
        bound = bound_of(f"fit({family}(), params={fraction})", *LARGE)
        assert 0.9 * fraction < bound.params / whole <= fraction, bound
    if family == "tucker":  # ranks in proportion to the axes, as the paper's rule
        ratios = np.array(bound.format.ranks) / np.array([64, 64, 64, 33])
        assert ratios.max() / ratios.min() < 1.1


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("monarch(blocks=2)", (6, (10, 4, 3)), "no weight of a Fourier layer"),
        ("tensor_train(rank=99)", (6, (10, 4, 3)), "nearest valid"),
        ("tucker(rank=99)", (6, (10, 4, 3)), "nearest valid"),
        ("cp(rank=999)", (6, (10, 4, 3)), "must be in 1..72"),
        ("tucker()", (6, (10, 4, 3)), "needs rank"),
        ("fit(cp(rank=3), params=0.1)", (6, (10, 4, 3)), "leaves nothing to choose"),
        ("fit(cp(), params=0.001)", (6, (10, 4, 3)), "less than the smallest cp"),
        ("dense()", (6, (10,)), "one mode count per axis"),
    ],
)
def test_what_does_not_fit_is_refused(text, sizes, message):
    with pytest.raises(StructureError, match=message):
        bound_of(text, *sizes)


def test_inputs_are_checked():
    x = jnp.zeros((2, 6, 6, 3))
    for modes, message in (((8, 4), "axis 0 .* holds 1 to 6 modes, not 8"), ((2,) * 4, "need 4 axes")):
        with pytest.raises(StructureError, match=message):
            jax.eval_shape(SpectralConv(4, modes).init, jax.random.key(0), x)
    bound = bound_of("dense()")
    with pytest.raises(StructureError, match="a spectrum of shape"):
        bound.contract(bound.init(jax.random.key(0)), jnp.zeros((2, 3, 4, 6), jnp.complex64))


class Model(nn.Module):
    """One Fourier layer, as a model of sites."""

    structures: tuple = ()
    width: int = 6

    @nn.compact
    def __call__(self, x):
        layer = SpectralConv(
            self.width, (4, 3), pick(self.structures, "one"), in_axes="embed", out_axes="mlp", name="one"
        )
        return layer(x)


def test_a_site_like_others():
    x = jax.ShapeDtypeStruct((2, 6, 5, 6), jnp.float32)
    model = assign(Model(), "one -> fit(tucker(), params=0.3)", x)
    site = sites(model, x)["one"]
    assert site.kind == "spectral" and site.bound.in_shape == (6,) and site.bound.out_shape == (6, 4, 2)
    again = Model(structures=(("one", parse(str(site.bound.structure))),))  # as a checkpoint rebuilds it
    assert sites(again, x) == sites(model, x) and bind("one", site, site.bound.structure) == site.bound
    boxed = jax.eval_shape(model.init, jax.random.key(0), x)["params"]["one"]
    assert boxed["factor0"].names == ("embed", None) and boxed["factor1"].names == ("mlp", None)
    with pytest.raises(StructureError, match="site one: monarch"):
        assign(Model(), "one -> monarch(blocks=2)", x)


@pytest.mark.long
def test_rates_and_gradients():
    """muP sees the channels as fan-in; against conjugated gradients the loss falls at the rate |g|^2."""
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 6)).astype(np.float32)
    model = assign(Model(), "one -> cp(rank=3)", x)
    variables = nn.unbox(model.init(jax.random.key(0), x))
    scale = multipliers(sites(model, x), sites(Model(), x), variables["params"])["one"]
    assert scale == {"bias": 1.0, "factor0": 1 / 4, "factor1": 6 / 12, "factor2": 6 / 4, "factor3": 6 / 4}
    loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x)))
    grads = jax.grad(loss)(variables["params"])
    step = jax.tree.map(jnp.conj, grads)
    _, slope = jax.jvp(loss, (variables["params"],), (step,))
    squares = sum(float(jnp.sum(jnp.abs(g) ** 2)) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(slope, squares, rtol=1e-4)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.long
def test_frozen_leaves_and_gain():
    x = jax.random.normal(jax.random.key(0), (1, 6, 5, 6))
    layer = SpectralConv(6, (4, 3), "tucker(rank=3, train=('core',))")
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    assert set(variables["params"]) == {"core", "bias"} and set(variables["frozen"]) == {f"factor{k}" for k in range(4)}
    double = layer.clone(gain=2.0)
    close(double.apply(double.init(jax.random.key(0), x), x), 2 * layer.apply(variables, x))
