"""Low rank beside frozen quantised weights (LQ-LoRA) in layers and a whole model: integers are kept, never trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.models import GPT
from structmat.nn import StructuredDense, StructuredEmbed, assign, choose_path
from structmat.structures import parse

TEXT = "low_rank(rank=4) + quantized(4, group=16)"


def variables(module, *args):
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), *args))


@pytest.mark.long
def test_codes_and_scales_are_frozen_and_the_layer_equals_its_matrix():
    x = jax.random.normal(jax.random.key(1), (3, 5, 32))
    layer = StructuredDense(24, structure=TEXT, use_bias=False)
    held = variables(layer, x)
    assert {n: v.dtype for n, v in held["frozen"]["1"].items()} == {"codes": np.uint8, "scales": np.float32}
    assert set(held["params"]) == {"0"} and set(held["params"]["0"]) == {"a", "b"}
    bound = parse(TEXT).bind(32, 24)
    w = jax.random.normal(jax.random.key(2), (32, 24))
    found = jax.jit(bound.project)(w)
    loaded = {"params": {"0": found["0"]}, "frozen": {"1": found["1"]}}
    matrix = bound.materialize(found)
    np.testing.assert_allclose(layer.apply(loaded, x), x @ matrix, atol=1e-5)
    assert jnp.linalg.norm(w - matrix) < 0.08 * jnp.linalg.norm(w)
    half = StructuredDense(24, structure=TEXT, use_bias=False, dtype=jnp.bfloat16).apply(loaded, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), x @ matrix, atol=0.2)


def test_embedding_rows_have_rms_one():
    embed = StructuredEmbed(256, 64, structure="quantized(4, group=32)")
    rows = embed.apply(variables(embed, jnp.arange(8)), jnp.arange(256))
    assert float(jnp.sqrt(jnp.mean(rows**2))) == pytest.approx(1, rel=0.1)


def test_the_product_does_not_keep_a_dense_copy_by_default():
    """Both paths dequantise; the factored one rebuilds the matrix in the backward pass."""
    for rows in (1, 8, 4096):
        assert choose_path(parse("quantized(4)").bind(512, 512), rows)[0] == "factored"


@pytest.mark.long
@pytest.mark.parametrize("scan", [True, False])
def test_a_model_trains_its_low_rank_half_alone(scan):
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 16)
    sizes = dict(vocab=32, context=16, layers=2, width=16, heads=2, scan=scan)
    model = assign(GPT(**sizes), TEXT, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    held = variables(model, tokens)
    params, frozen = held["params"], held["frozen"]
    assert {v.dtype for v in jax.tree.leaves(frozen)} == {np.dtype("uint8"), np.dtype("float32")}
    tx = optax.adam(3e-2)
    state = tx.init(params)
    assert all(v.dtype != np.uint8 for v in jax.tree.leaves((params, state)))

    @jax.jit
    def step(params, state, frozen):
        def loss(params):
            logits = jax.nn.log_softmax(model.apply({"params": params, "frozen": frozen}, tokens[:, :-1]))
            return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    start, losses = params, []
    for _ in range(12):
        params, state, value = step(params, state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    moved = {
        "/".join(p.key for p in path): bool(jnp.any(a != b))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(params))
    }
    low = {name: on for name, on in moved.items() if name.endswith(("0/a", "0/b"))}
    assert len(low) == 12 * (1 if scan else 2) and all(low.values())
