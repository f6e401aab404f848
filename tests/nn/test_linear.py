import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import StructuredDense, StructuredDenseGeneral, StructuredEmbed, choose_path, sites
from structmat.nn.sites import site_params
from structmat.parallel import make_mesh, on_mesh, shardings
from structmat.structures import StructureError, parse
from tests.marks import mostly_long

KEY = jax.random.key(0)
STRUCTURES = ["dense()", "low_rank(rank=4)", "monarch(blocks=2)", "low_rank(rank=2) + frozen(monarch(blocks=2))"]


def variables(module, *args):
    return nn.unbox(jax.jit(module.init)(KEY, *args))


@pytest.mark.parametrize("text", STRUCTURES)
def test_layer_equals_its_dense_matrix(text):
    x = jax.random.normal(KEY, (3, 5, 16))
    layer = StructuredDense(24, structure=text)
    held = variables(layer, x)
    found = {n: v for c in ("params", "frozen") for n, v in held.get(c, {}).items() if n != "bias"}
    bound = parse(text).bind(16, 24)
    expected = x @ bound.materialize(found) + held["params"]["bias"]
    np.testing.assert_allclose(layer.apply(held, x), expected, atol=1e-5)


def test_dense_is_a_drop_in_for_flax():
    x = jax.random.normal(KEY, (3, 16))
    ours, theirs = StructuredDense(8), nn.Dense(8)
    held = variables(ours, x)
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, theirs.init(KEY, x))
    np.testing.assert_array_equal(ours.apply(held, x), theirs.apply(held, x))


def test_general_contracts_and_makes_several_axes():
    x = jax.random.normal(KEY, (2, 4, 6))
    layer = StructuredDenseGeneral((3, 8), axis=(-2, -1), structure="low_rank(rank=2)", use_bias=False)
    held = variables(layer, x)
    w = held["params"]["a"].T @ held["params"]["b"]
    np.testing.assert_allclose(layer.apply(held, x), (x.reshape(2, 24) @ w).reshape(2, 3, 8), atol=1e-5)


def test_frozen_and_trainable_leaves_are_apart_and_drawn_together():
    x = jnp.ones((2, 16))
    held = variables(StructuredDense(24, structure="frozen(dense()) + low_rank(rank=2)"), x)
    assert set(held["params"]) == {"1", "bias"} and set(held["frozen"]) == {"0"}
    assert not held["params"]["1"]["b"].any() and held["frozen"]["0"]["kernel"].any()
    one = variables(StructuredDense(24, structure="low_rank(rank=2)"), x)["params"]
    part = variables(StructuredDense(24, structure="low_rank(rank=2, train=('b',))"), x)
    np.testing.assert_array_equal(part["frozen"]["a"], one["a"])
    np.testing.assert_array_equal(part["params"]["b"], one["b"])


def test_gain_zero_starts_at_zero_with_live_gradients():
    x = jnp.ones((2, 16))
    layer = StructuredDense(16, structure="monarch(blocks=2)", gain=0.0)
    held = variables(layer, x)
    assert not layer.apply(held, x).any()
    grads = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(held["params"])
    assert jnp.abs(grads["L"]).max() > 0


@pytest.mark.parametrize("text", ["low_rank(rank=2, train=('a',))", "product(dense(), frozen(dense()), inner=4)"])
def test_gain_zero_is_put_where_something_trains(text):
    x = jnp.ones((2, 16))
    layer = StructuredDense(16, structure=text, gain=0.0, use_bias=False)
    held = variables(layer, x)
    assert not layer.apply(held, x).any()
    grads = jax.grad(lambda p: layer.apply(held | {"params": p}, x).sum())(held["params"])
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


@pytest.mark.parametrize("path", ["factored", "dense"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_paths_agree(path, dtype):
    x = jax.random.normal(KEY, (4, 16))
    layer = StructuredDense(24, structure="monarch(blocks=2)", path=path, dtype=dtype)
    held = variables(layer, x)
    y = layer.apply(held, x)
    assert y.dtype == dtype and held["params"]["R"].dtype == jnp.float32
    full = StructuredDense(24, structure="monarch(blocks=2)", path="factored").apply(held, x)
    np.testing.assert_allclose(y.astype(jnp.float32), full, atol=1e-5 if dtype == jnp.float32 else 0.05)


def test_auto_path_follows_the_break_even():
    low = parse("low_rank(rank=8)").bind(512, 512)
    assert choose_path(low, 4096)[0] == "factored"
    full = parse("low_rank(rank=512)").bind(512, 512)
    assert choose_path(full, 4096)[0] == "dense"
    assert choose_path(full, 1)[0] == "factored"
    blocks = parse("block_sparse(block=128, density=0.5)").bind(1024, 1024)
    assert [choose_path(blocks, 4096, kernel)[0] for kernel in (None, 0.75)] == ["dense", "factored"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"structure": "monarch(blocks=5)"}, "blocks=5 does not fit"),
        ({"path": "fast"}, "path must be one of auto, factored, dense"),
        ({"kind": "attention"}, "kind must be one of"),
        ({"axis": 0}, "must name the last axes"),
        ({"axis": 5}, "must name the last axes"),
        ({"structure": "low_rank(rank=2, train=('c',))"}, "train has no leaf 'c'"),
    ],
)
def test_bad_arguments_name_the_value(kwargs, message):
    with pytest.raises(StructureError, match=message):
        StructuredDenseGeneral(16, **kwargs).init(KEY, jnp.ones((4, 16)))


@pytest.mark.parametrize("text", STRUCTURES)
def test_embedding_rows_have_rms_one_and_attend_is_the_transpose(text):
    embed = StructuredEmbed(512, 64, structure=text)
    ids = jnp.arange(512)
    held = variables(embed, ids)
    table = embed.apply(held, ids)
    rms = float(jnp.sqrt(jnp.mean(table**2)))
    assert 0.8 < rms < 1.25
    x = jax.random.normal(KEY, (3, 64))
    np.testing.assert_allclose(embed.apply(held, x, method="attend"), x @ table.T, rtol=2e-3, atol=2e-3)
    with pytest.raises(StructureError, match="integers"):
        embed.apply(held, jnp.ones((3,)))


def test_leaves_carry_the_sites_logical_axes():
    layer = StructuredDense(24, structure="low_rank(rank=4)", in_axes="embed", out_axes="mlp")
    boxed = layer.init(KEY, jnp.ones((2, 16)))["params"]
    assert (
        boxed["a"].names == ("rank", "embed")
        and boxed["b"].names == ("rank", "mlp")
        and boxed["bias"].names == ("mlp",)
    )
    (site,) = sites(nn.Sequential([layer]), jnp.ones((2, 16))).values()
    assert site.in_axes == ("embed",) and site.out_axes == ("mlp",) and site.kind == "linear"


def test_both_sides_may_share_an_axis_on_a_mesh():
    layer = StructuredDense(16, structure="low_rank(rank=4) + dense()", in_axes="embed", out_axes="embed")
    x = jnp.ones((2, 16))
    with on_mesh(make_mesh({"fsdp": -1})) as mesh:
        boxed = jax.eval_shape(layer.init, KEY, x)
        held = jax.jit(lambda: nn.unbox(layer.init(KEY, x)), out_shardings=shardings(mesh, boxed))()
    kernel = held["params"]["1"]["kernel"]
    assert boxed["params"]["1"]["kernel"].names == ("embed", "embed")
    assert kernel.addressable_shards[0].data.shape == (2, 16)


TRANSFORMS = ["dct()", "hadamard() @ dct()", "diagonal() @ dct()", "low_rank(rank=2) + hadamard()"]


@pytest.mark.parametrize("text", mostly_long(TRANSFORMS, TRANSFORMS[2:3]))
@pytest.mark.parametrize("path", ["factored", "dense"])
def test_transforms_without_leaves(text, path):
    """They are stored as nothing, and computed in the dtype of the module though they materialise in f32."""
    x = jax.random.normal(KEY, (3, 16)).astype(jnp.bfloat16)
    layer = nn.Sequential([StructuredDense(16, structure=text, use_bias=False, dtype=jnp.bfloat16, path=path)])
    held = variables(layer, x)
    ((where, site),) = sites(layer, x).items()
    params = site_params(held, where, site)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(site.bound.init, KEY))
    y = jax.jit(layer.apply)(held, x)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float32) @ site.bound.materialize(params)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=0.1)
    embed = StructuredEmbed(16, 16, structure=text, dtype=jnp.bfloat16)
    rows = embed.apply(variables(embed, jnp.arange(3)), jnp.arange(3))
    assert (rows.shape, rows.dtype) == ((3, 16), jnp.bfloat16)
