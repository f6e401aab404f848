"""ViT against a plain numpy model of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import ViT
from structmat.models.vit import patches
from structmat.nn import assign, sites
from tests.marks import mostly_long
from tests.models.helpers import PlainImageModel, shaken

SIZES = dict(classes=5, size=6, patch=2, channels=2, layers=2, width=16, heads=2, mlp_ratio=2)
EXAMPLE = jax.ShapeDtypeStruct((3, 6, 6, 2), jnp.float32)
RULES = "layers_.*/mlp/.* -> monarch(blocks=2); patches -> low_rank(rank=3)"


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (3, 6, 6, 2))


def reference(model, variables, image):
    """Logits of one image."""
    plain, size = PlainImageModel(model, variables, EXAMPLE), model.width // model.heads
    x = plain.patches(image)
    if model.pool == "token":
        x = np.concatenate([plain.own("token")[None], x])
    x = x + plain.own("positions")
    for i in range(model.layers):
        y = plain.norm(x, f"layers_{i}/attn_norm")
        q, k, v = (plain.linear(y, f"layers_{i}/attn/{name}").reshape(-1, model.heads, size) for name in "qkv")
        p = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size))
        y = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + plain.linear(y, f"layers_{i}/attn/o")
        x = x + plain.mlp(plain.norm(x, f"layers_{i}/mlp_norm"), f"layers_{i}/mlp")
    x = plain.norm(x, "norm")
    return plain.linear(x[0] if model.pool == "token" else x.mean(0), "head")


@pytest.mark.parametrize(("rules", "pool"), mostly_long([(RULES, "token"), ("dense()", "mean")], [(RULES, "token")]))
def test_logits_equal_the_plain_model(images, rules, pool):
    model = assign(ViT(**SIZES, pool=pool), rules, EXAMPLE)
    held = shaken(model, images)
    logits = jax.jit(model.apply)(held, images)
    expected = np.stack([reference(model, held, image) for image in images])
    assert logits.dtype == jnp.float32 and np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())


def test_patches_are_the_products_of_a_strided_convolution(images):
    kernel = jax.random.normal(jax.random.key(2), (2, 2, 2, 7))
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(images, kernel, (2, 2), "VALID", dimension_numbers=layout)
    found = patches(images, 6, 2, 2) @ kernel.reshape(8, 7)
    np.testing.assert_allclose(found, expected.reshape(3, 9, 7), atol=1e-5)
    np.testing.assert_array_equal(patches(images.reshape(3, -1), 6, 2, 2), patches(images, 6, 2, 2))


def test_a_bare_structure_leaves_patches_and_head_dense():
    table = sites(assign(ViT(**SIZES), "low_rank(rank=2)", EXAMPLE), EXAMPLE)
    assert len(table) == 2 * 6 + 2
    assert {path for path, site in table.items() if site.bound.structure.name == "dense"} == {"patches", "head"}
    assert table["patches"].kind == "conv" and table["patches"].bound.d_in == 8


def test_sizes_are_checked(images):
    for change, message in (
        ({"heads": 3}, "heads=3 must divide width=16"),
        ({"patch": 4}, "patch=4 must divide size=6"),
        ({"pool": "max"}, "pool must be one of token, mean"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(ViT(**SIZES | change).init, jax.random.key(0), images)
