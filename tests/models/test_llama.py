"""LLaMA against a plain numpy model of the same weights, and what the training loop and sampling need of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import Llama
from structmat.models.decode import generate
from structmat.models.rope import rotate
from structmat.nn import assign, site_params, sites
from tests.marks import mostly_long
from tests.models.helpers import decoded, shaken

SIZES = dict(vocab=32, context=12, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
EXAMPLE = jax.ShapeDtypeStruct((2, 12), jnp.int32)
RULES = "layers_0/.* -> monarch(blocks=2); layers_1/mlp/gate -> low_rank(rank=3)"


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 32)


def reference(model, variables, tokens):
    """Logits in float64 numpy, one query at a time; weights only as dense matrices."""
    table = sites(model, jax.ShapeDtypeStruct(tokens.shape, jnp.int32))
    weight = lambda path: np.asarray(
        table[path].bound.materialize(site_params(variables, path, table[path])), np.float64
    )
    group = next(name for name in variables["params"] if name.startswith("layers_"))
    stacked = "to" in group

    def scale(layer, name):
        params = variables["params"][group if stacked else f"layers_{layer}"][name]["scale"]
        return np.asarray(params[layer] if stacked else params, np.float64)

    norm = lambda x, g: x / np.sqrt((x**2).mean(-1, keepdims=True) + model.eps) * g
    size = model.width // model.heads

    def turn(v, position):
        out = np.empty_like(v)
        for i in range(size // 2):
            angle = position * model.theta ** (-2 * i / size)
            a, b = v[i], v[i + size // 2]
            out[i], out[i + size // 2] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    def attention(x, layer):
        q, k, v = (x @ weight(f"layers_{layer}/attn/{name}") for name in "qkv")
        cut = lambda a, t, h: a[t, h * size : (h + 1) * size]
        out = np.zeros((len(x), model.width))
        for t in range(len(x)):
            for h in range(model.heads):
                g = h * model.kv_heads // model.heads
                mine = turn(cut(q, t, h), t)
                scores = np.array([mine @ turn(cut(k, s, g), s) for s in range(t + 1)]) / np.sqrt(size)
                p = np.exp(scores - scores.max())
                out[t, h * size : (h + 1) * size] = sum(w * cut(v, s, g) for s, w in enumerate(p / p.sum()))
        return out @ weight(f"layers_{layer}/attn/o")

    def logits(row):
        x = weight("embed")[row]
        for layer in range(model.layers):
            x = x + attention(norm(x, scale(layer, "attn_norm")), layer)
            y = norm(x, scale(layer, "mlp_norm"))
            gate, up = y @ weight(f"layers_{layer}/mlp/gate"), y @ weight(f"layers_{layer}/mlp/up")
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"layers_{layer}/mlp/down")
        return norm(x, np.asarray(variables["params"]["norm"]["scale"], np.float64)) @ weight("head")

    return np.stack([logits(row) for row in np.asarray(tokens)])


@pytest.mark.parametrize(("rules", "kv_heads"), mostly_long([(RULES, 2), ("dense()", 4), ("dense()", 1)], [(RULES, 2)]))
def test_logits_equal_the_plain_model(tokens, rules, kv_heads):
    model = assign(Llama(**SIZES | {"kv_heads": kv_heads}), rules, EXAMPLE)
    held = shaken(model, tokens)
    expected = reference(model, held, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(jax.jit(model.apply)(held, tokens), expected, atol=2e-5 * np.abs(expected).max())


def test_rotation_depends_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    product = lambda s, t: float((rotate(q, s) * rotate(k, t)).sum())
    assert product(3, 5) == pytest.approx(product(10, 12), abs=1e-5)
    assert abs(product(3, 5) - product(3, 6)) > 1e-3
    with pytest.raises(ValueError, match="even head size, got 3"):
        rotate(jnp.ones((1, 1, 1, 3)), 0)


@pytest.mark.parametrize("rules", mostly_long(["dense()", RULES], ["dense()"]))
def test_decoding_with_the_cache_equals_the_full_forward(tokens, rules):
    model = assign(Llama(**SIZES), rules, EXAMPLE)
    held = shaken(model, tokens)
    logits, cache = decoded(model, held, tokens)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(held, tokens), atol=1e-4)
    assert all(leaf.shape[-2] == 2 for leaf in jax.tree.leaves(cache) if leaf.ndim > 1)  # key-value heads only


@pytest.mark.long
def test_greedy_sampling_takes_the_likeliest_token_of_the_full_forward(tokens):
    model = Llama(**SIZES)
    held = shaken(model, tokens)
    new = generate(model, held, tokens[:, :4], 5, jax.random.key(0), temperature=0)
    whole = jnp.concatenate([tokens[:, :4], new], 1)
    np.testing.assert_array_equal(new, jax.jit(model.apply)(held, whole)[:, 3:-1].argmax(-1))


def test_sites_and_axes(tokens):
    model = Llama(**SIZES)
    table = sites(model, EXAMPLE)
    assert len(table) == 2 * 7 + 2
    assert table["layers_1/attn/k"].bound.d_out == 8 and table["layers_1/attn/q"].bound.d_out == 16
    column, row = table["layers_0/mlp/gate"], table["layers_0/mlp/down"]
    assert (column.in_axes, column.out_axes, row.in_axes, row.out_axes) == (("embed",), ("mlp",), ("mlp",), ("embed",))
    assert table["layers_0/attn/q"].out_axes == ("heads", "kv") == table["layers_0/attn/o"].in_axes
    held = shaken(model, tokens)
    assert "bias" not in "".join(jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(held))


@pytest.mark.long
def test_scanned_gradients_equal_unrolled(tokens):
    model = Llama(**SIZES)
    held = shaken(model, tokens)
    flat = {k: v for k, v in held["params"].items() if "to" not in k}
    for i in range(2):
        flat[f"layers_{i}"] = jax.tree.map(lambda a, i=i: a[i], held["params"]["layers_0to1"])
    plain = model.clone(scan=False, remat="none")
    loss = lambda m: jax.jit(jax.grad(lambda p: jnp.mean(m.apply({"params": p}, tokens) ** 2)))
    scanned = loss(model.clone(remat="full"))(held["params"])["layers_0to1"]["mlp"]["gate"]["kernel"][1]
    unrolled = loss(plain)(flat)["layers_1"]["mlp"]["gate"]["kernel"]
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5 * float(jnp.abs(unrolled).max()))


def test_sizes_are_checked(tokens):
    for change, message in (
        ({"heads": 3}, "heads=3 must divide width=16"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"heads": 16, "kv_heads": 16}, "even head size, got 1"),
        ({"context": 11}, "12 tokens do not fit context=11"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(Llama(**SIZES | change).init, jax.random.key(0), tokens)
