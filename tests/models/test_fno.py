"""FNO against plain numpy transforms, its symmetries, its sizes, and patches over a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from structmat.models.coordinates import with_coordinates
from structmat.models.fno import FNO
from structmat.models.multigrid import patch, stitch
from structmat.nn import assign, site_params, sites
from structmat.parallel import make_mesh, on_mesh
from structmat.structures import StructureError
from tests.marks import mostly_long

SMALL = dict(features=2, width=6, layers=2, modes=(4, 3))
X = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype(np.float32)


def drawn(model, x):
    """Variables at initialisation, with biases and gates moved off their start."""
    variables = nn.unbox(model.init(jax.random.key(0), x))
    rng = np.random.default_rng(1)
    move = lambda v: v + rng.normal(0, 0.3, v.shape).astype(np.float32) if v.ndim == 1 else v
    return jax.tree.map(move, variables)


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


def reference(model, variables, x):
    """By numpy's transforms and dense weights; structured weights only materialised."""
    table, axes = sites(model, x), tuple(range(1, x.ndim - 1))
    gelu = lambda y: np.asarray(jax.nn.gelu(y))
    dense = lambda path: np.asarray(table[path].bound.materialize(site_params(variables, path, table[path])))

    def own(path):
        node = variables["params"]
        for part in path.split("/"):
            node = node[part]
        return node

    def linear(y, path):
        y = y @ dense(path)
        return y + own(path).get("bias", 0)

    def spectral(y, path):
        space, m = y.shape[1:-1], model.modes
        w = dense(path).reshape(y.shape[-1], y.shape[-1], *m[:-1], m[-1] // 2 + 1)
        z, out = np.fft.rfftn(y, axes=axes), np.zeros((len(y), *space[:-1], space[-1] // 2 + 1, y.shape[-1]), complex)
        for at in np.ndindex(w.shape[2:]):
            k = tuple(i - c if i >= (c + 1) // 2 else i for i, c in zip(at[:-1], m)) + at[-1:]
            out[(slice(None), *k)] = z[(slice(None), *k)] @ w[(..., *at)]
        return np.fft.irfftn(out, s=space, axes=axes) + own(path).get("bias", 0)

    def normed(y, path):
        if model.norm == "none":
            return y
        y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-6)
        return y * own(path)["scale"] + own(path)["bias"]

    x = np.asarray(with_coordinates(x)) if model.grid else x
    x = linear(gelu(linear(x, "lift_up")), "lift_down")
    around = [(0, 0), *(2 * (round(model.padding * n),) for n in x.shape[1:-1]), (0, 0)]
    x = np.pad(x, around)
    for i in range(model.layers):
        name = f"layers_{i}"
        active = gelu if i < model.layers - 1 else lambda y: y
        y = active(normed(spectral(x, f"{name}/spectral"), f"{name}/norm1") + linear(x, f"{name}/skip"))
        y = linear(gelu(linear(y, f"{name}/mlp_up")), f"{name}/mlp_down")
        x = active(normed(y + own(name)["gate"] * x, f"{name}/norm2"))
    x = x[tuple(slice(p, n - p) for (p, _), n in zip(around, x.shape))]
    return linear(gelu(linear(x, "project_up")), "head")


@pytest.mark.parametrize(
    ("modes", "rules", "fields"),
    mostly_long(
        [
            ((4, 3), "layers_.*/spectral -> cp(rank=4)", {}),
            ((4, 3), "dense()", {}),
            ((7,), "layers_1/spectral -> tucker(rank=3)", {}),
            ((4, 7), "dense()", dict(padding=0.3)),  # 2 points on either side of both axes; 7 modes are beyond 6 points
            ((4, 3), "layers_.*/spectral -> cp(rank=4)", dict(norm="instance")),
            ((7,), "dense()", dict(padding=0.25, norm="instance")),
        ],
        [((7,), "dense()", dict(padding=0.25, norm="instance"))],
    ),
)
def test_output_is_the_plain_network(modes, rules, fields):
    x = X if len(modes) == 2 else X[:, :, 0]
    model = assign(FNO(**SMALL | dict(modes=modes) | fields), rules, x)
    variables = drawn(model, x)
    got, expected = jax.jit(model.apply)(variables, x), reference(model, variables, x)
    assert got.dtype == jnp.float32 and got.shape == (*x.shape[:-1], 2) and np.abs(expected).max() > 0.1
    close(got, expected)


def test_sites_and_sizes_of_the_card():
    model, x = FNO(width=64, layers=4, modes=(64, 64)), jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32)
    table = sites(model, x)
    assert sum(s.bound.params for s in table.values() if s.kind == "spectral") == 69_206_016
    assert {path: site.kind for path, site in table.items() if not path.startswith("layers_")} == {
        "head": "head",
        "lift_down": "linear",
        "lift_up": "conv",
        "project_up": "linear",
    }
    assert [path for path in table if path.startswith("layers_3")] == [
        f"layers_3/{name}" for name in ("mlp_down", "mlp_up", "skip", "spectral")
    ]
    low = sites(assign(model, "layers_.*/spectral -> fit(tucker(), params=0.02)", x), x)
    spent = sum(s.bound.params for s in low.values() if s.kind == "spectral") / 69_206_016
    assert 0.018 < spent <= 0.02
    with pytest.raises(StructureError, match="no weight of a Fourier layer"):
        assign(model, ".*/spectral -> low_rank(rank=2)", x)


@pytest.mark.long
def test_shifts_pass_through_without_coordinates():
    model = FNO(**SMALL, grid=False)
    variables = drawn(model, X)
    apply = jax.jit(model.apply)
    y, rolled = apply(variables, X), apply(variables, np.roll(X, (3, 2), (1, 2)))
    close(rolled, np.roll(y, (3, 2), (1, 2)))
    model = FNO(**SMALL)
    variables = drawn(model, X)
    y, rolled = model.apply(variables, X), model.apply(variables, np.roll(X, (3, 2), (1, 2)))
    assert np.abs(rolled - np.roll(y, (3, 2), (1, 2))).max() > 1e-2


@pytest.mark.long
def test_the_same_parameters_apply_on_a_finer_grid():
    """A smooth field gives the same output there, up to what GELU puts beyond the coarse grid."""
    model = FNO(**SMALL, grid=False)
    field = lambda n: np.stack(np.meshgrid(*[np.sin(2 * np.pi * np.arange(n) / n)] * 2, indexing="ij"), -1)[None]
    coarse, fine = (field(n).astype(np.float32) for n in (16, 32))
    variables = drawn(model, coarse)
    y = model.apply(variables, coarse)
    close(model.apply(variables, fine)[:, ::2, ::2], y, 1e-2)


@pytest.mark.long
def test_padding_of_no_points_changes_no_operation():
    """And a ramp, whose ends differ, sees the points it is given, with the same parameters."""
    ramp = np.broadcast_to(np.linspace(-1, 1, 8, dtype=np.float32)[None, :, None], (2, 8, 1))
    fields = dict(width=4, layers=2, modes=(3,))
    plain, none, model = (FNO(**fields, padding=p) for p in (0.0, 0.06, 0.25))
    variables = drawn(plain, ramp)
    text = lambda model: str(jax.make_jaxpr(model.apply)(variables, ramp))
    assert text(none) == text(plain) != text(model)
    y, other = (jax.jit(m.apply)(variables, ramp) for m in (plain, model))
    assert other.shape == y.shape == (2, 8, 1) and np.abs(y - other).max() > 1e-2 * np.abs(y).max()


def test_a_norm_replaces_the_biases_before_it():
    shapes = lambda **f: nn.unbox(jax.eval_shape(FNO(**SMALL, **f).init, jax.random.key(0), X))["params"]["layers_0"]
    plain, normed = shapes(), shapes(norm="instance")
    assert set(normed) - set(plain) == {"norm1", "norm2"}
    biased = lambda layer: {name for name, node in layer.items() if isinstance(node, dict) and "bias" in node}
    assert biased(plain) == {"spectral", "mlp_up", "mlp_down"}
    assert biased(normed) == {"norm1", "mlp_up", "norm2"}


def test_sizes_are_checked():
    for model, message in (
        (FNO(), "need an input"),
        (FNO(modes=(4,), norm="instanse"), "did you mean 'instance'"),
        (FNO(modes=(4,), padding=-0.1), r"padding=-0.1 must be a fraction"),
        (FNO(modes=(4,), padding=0.1, levels=1), "padding=0.1 is for a domain with ends, levels=1"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 16, 1)))


@pytest.mark.long
def test_patches_know_where_they_are():
    """Of a constant field the four patches are alike but for their place, which a force that is not the same everywhere
    makes them need."""
    x = np.ones((1, 16, 16, 1), np.float32)
    for grid in (True, False):
        model = FNO(width=4, layers=1, modes=(3, 3), levels=1, grid=grid)
        cut = patch(model.apply(drawn(model, x), x), 1)
        assert cut.shape[0] == 4 and bool(jnp.ptp(cut, axis=0).max() > 1e-3) is grid


@pytest.mark.long
def test_patches_split_over_a_mesh():
    """Layers act on patches, whose stitched output and gradients are those of one device."""
    x = np.random.default_rng(0).normal(size=(2, 8, 16, 1)).astype(np.float32)
    fields = dict(width=4, layers=1, modes=(3, 3))
    model, plain = FNO(**fields, levels=1, margin=0.125), FNO(**fields)
    variables = drawn(model, x)
    expected = stitch(plain.clone(grid=False).apply(variables, patch(with_coordinates(x), 1, (1, 2))), 1, (1, 2))
    close(model.apply(variables, x), expected)
    loss = lambda v, x: jnp.sum(jnp.sin(model.apply(v, x)))
    gradient = jax.grad(loss)(variables, x)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with on_mesh(mesh):
        held = jax.device_put((variables, x), NamedSharding(mesh, P()))
        got = jax.jit(lambda v, x: (model.apply(v, x), jax.grad(loss)(v, x)))(*held)
    within = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))
    jax.tree.map(within, got, (expected, gradient))


@pytest.mark.long
@pytest.mark.parametrize("text", ["dense()", "tucker(rank=4)", "cp(rank=8)", "tensor_train(rank=4)"])
def test_it_learns_a_shift_and_a_square(text):
    """Complex Adam on conjugated gradients; u -> (shifted u)^2 is no linear map, yet local in what layers compute."""
    import optax

    model = assign(FNO(width=8, layers=2, modes=(7,), grid=False), f"layers_.*/spectral -> {text}", X[:, :, :1, 0])
    rng = np.random.default_rng(0)
    waves = np.exp(2j * np.pi * np.outer(np.arange(1, 4), np.arange(16)) / 16)
    x = ((rng.normal(size=(64, 3)) + 1j * rng.normal(size=(64, 3))) @ waves).real[..., None].astype(np.float32) / 2
    y = np.roll(x, 2, 1) ** 2
    params = nn.unbox(model.init(jax.random.key(0), x))["params"]
    loss = lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2) / jnp.mean(y**2)
    tx = optax.adam(5e-3)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(jax.tree.map(jnp.conj, grads), state)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(400):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 < values[0], (values[0], values[-1])
