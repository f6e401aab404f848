"""Mixer against a plain numpy model of the same weights, and what its sites are said to multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import Mixer
from structmat.nn import assign
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.tasks.image_models import mixer_rows
from tests.models.helpers import PlainImageModel, shaken

SIZES = dict(classes=5, size=6, patch=2, channels=2, layers=2, width=16, tokens_hidden=7, mlp_ratio=2)
EXAMPLE = jax.ShapeDtypeStruct((3, 6, 6, 2), jnp.float32)
RULES = "layers_.*/mlp/.* -> monarch(blocks=2); layers_.*/tokens/up -> low_rank(rank=3)"


def reference(model, variables, image):
    """Logits of one image."""
    plain = PlainImageModel(model, variables, EXAMPLE)
    x = plain.patches(image)
    for i in range(model.layers):
        x = x + plain.mlp(plain.norm(x, f"layers_{i}/tokens_norm").T, f"layers_{i}/tokens").T
        x = x + plain.mlp(plain.norm(x, f"layers_{i}/mlp_norm"), f"layers_{i}/mlp")
    return plain.linear(plain.norm(x, "norm").mean(0), "head")


def test_logits_equal_the_plain_model():
    images = jax.random.normal(jax.random.key(1), EXAMPLE.shape)
    model = assign(Mixer(**SIZES), RULES, EXAMPLE)
    held = shaken(model, images)
    logits = jax.jit(model.apply)(held, images)
    expected = np.stack([reference(model, held, image) for image in images])
    assert logits.dtype == jnp.float32 and np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())


def test_parameters_and_flops_have_their_closed_forms():
    config = default("images", "mixer")
    config.model.update(size=12, patch=3, channels=2, layers=3, width=20, tokens_hidden=24, mlp_ratio=3)
    task, tokens = validate(config, devices=1), 16
    across, along = 2 * tokens * 24, 2 * 20 * 60
    biases = 24 + tokens + 60 + 20
    assert task.params == 18 * 20 + 20 + 3 * (across + along + biases + 4 * 20) + 2 * 20 + 20 * 10 + 10
    assert task.flops() == 2 * (tokens * 18 * 20 + 3 * (20 * across + tokens * along) + 20 * 10)
    assert [mixer_rows(config)(path) for path in ("layers_2/tokens/up", "layers_2/mlp/up", "head")] == [20, tokens, 1]


def test_sizes_are_checked():
    for change, message in (({"patch": 3}, "must divide model.size=8"), ({"tokens_hidden": 0}, "at least 1")):
        config = default("images", "mixer")
        config.model.update(change)
        with pytest.raises(ConfigError, match=message):
            validate(config)
    with pytest.raises(ValueError, match="patch=4 must divide size=6"):
        jax.eval_shape(Mixer(**SIZES | {"patch": 4}).init, jax.random.key(0), EXAMPLE)
