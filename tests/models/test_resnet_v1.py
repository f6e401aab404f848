"""Residual networks and VGG with batch normalisation against torch, and their published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import VGG, ResNetV1
from structmat.nn import assign, site_params, sites
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from tests.models.helpers import shaken

RULES = "layers_.*/conv2/conv -> low_rank(rank=2)"
RESNET = dict(classes=5, width=8)
CASES = {
    "small": (ResNetV1(**RESNET, blocks=(1, 2)), 8),
    "bottleneck, large": (ResNetV1(**RESNET, blocks=(1, 1), bottleneck=True, large=True), 16),
    "vgg": (VGG(classes=5, width=4, convs=(1, 1)), 8),
}


def torch():
    """Torch itself, which only the long tests have."""
    return pytest.importorskip("torch")


class Plain:
    """The same in torch, channels first; weights only as dense kernels, running statistics changed in place."""

    def __init__(self, model, variables, images, train):
        self.table, self.variables, self.train = sites(model, images), variables, train
        self.stats = jax.tree.map(lambda a: torch().from_numpy(np.array(a)), variables["batch_stats"])

    def leaf(self, tree, path):
        for part in path.split("/"):
            tree = tree[part]
        return jax.tree.map(lambda a: a if isinstance(a, torch().Tensor) else torch().from_numpy(np.array(a)), tree)

    def conv(self, x, path, size, stride=1):
        site = self.table[f"{path}/conv"]
        matrix = np.array(site.bound.materialize(site_params(self.variables, f"{path}/conv", site)))
        kernel = torch().from_numpy(matrix).reshape(size, size, x.shape[1], -1).permute(3, 2, 0, 1)
        y = torch().nn.functional.conv2d(x, kernel, stride=stride, padding=size // 2)
        norm, held = self.leaf(self.variables["params"], f"{path}/norm"), self.leaf(self.stats, f"{path}/norm")
        return torch().nn.functional.batch_norm(
            y, held["mean"], held["var"], norm["scale"], norm["bias"], self.train, 0.1, 1e-5
        )

    def head(self, x):
        own = self.leaf(self.variables["params"], "head")
        return (x.mean((2, 3)) @ own["kernel"] + own["bias"]).numpy()


def resnet(model, plain, x):
    x = plain.conv(x, "stem", 7 if model.large else 3, 2 if model.large else 1).relu()
    x = torch().nn.functional.max_pool2d(x, 3, 2, 1) if model.large else x
    i = 0
    for stage, count in enumerate(model.blocks):
        for j in range(count):
            stride, at = 2 if stage and not j else 1, f"layers_{i}"
            if model.bottleneck:
                y = plain.conv(x, f"{at}/conv1", 1).relu()
                y = plain.conv(plain.conv(y, f"{at}/conv2", 3, stride).relu(), f"{at}/conv3", 1)
            else:
                y = plain.conv(plain.conv(x, f"{at}/conv1", 3, stride).relu(), f"{at}/conv2", 3)
            x = plain.conv(x, f"{at}/shortcut", 1, stride) if f"{at}/shortcut/conv" in plain.table else x
            x, i = (x + y).relu(), i + 1
    return plain.head(x)


def vgg(model, plain, x):
    i = 0
    for count in model.convs:
        for _ in range(count):
            x, i = plain.conv(x, f"layers_{i}", 3).relu(), i + 1
        x = torch().nn.functional.max_pool2d(x, 2)
    return plain.head(x)


@pytest.mark.long
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_statistics_are_those_of_torch(case, train):
    model, size = CASES[case]
    images = jax.random.normal(jax.random.key(1), (4, size, size, 2))
    model = model if case == "vgg" else assign(model, RULES, images)
    held = shaken(model, images)
    held["batch_stats"] = jax.tree.map(lambda a: jnp.abs(a) + 0.5, held["batch_stats"])
    call = jax.jit(lambda v: model.apply(v, images, train, mutable=["batch_stats"]))
    logits, new = call(held)
    plain = Plain(model, held, images, train)
    x = torch().from_numpy(np.array(images)).permute(0, 3, 1, 2)
    expected = (vgg if case == "vgg" else resnet)(model, plain, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    before, after = held["batch_stats"], new["batch_stats"]
    if not train:
        jax.tree.map(np.testing.assert_array_equal, before, after)
        return
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        theirs, ours = plain.leaf(plain.stats, name).numpy(), plain.leaf(after, name).numpy()
        if name.endswith("var"):  # torch takes n / (n - 1) of the batch's variance
            count = images.shape[0] * model.positions(name.replace("/norm/", "/conv/"), size)
            theirs = 0.9 * np.asarray(old) + (theirs - 0.9 * np.asarray(old)) * (count - 1) / count
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "fields", "params", "flops"),
    [
        # He et al. 2016: 0.27 million of ResNet-20, whose shortcuts there have no parameters; 41 million products
        ("resnet_v1", dict(depth=20, size=32, channels=3), 269_722 + 2 * 1024 + 512 + 2 * (32 + 64), 2 * 41_000_000),
        # torchvision's counts, and its products to three digits
        (
            "resnet_v1",
            dict(depth=18, width=64, size=224, channels=3, classes=1000, large=True),
            11_689_512,
            2 * 1.814e9,
        ),
        (
            "resnet_v1",
            dict(depth=50, width=64, size=224, channels=3, classes=1000, large=True),
            25_557_032,
            2 * 4.089e9,
        ),
        # without the 5,504 biases that batch normalisation makes idle
        ("vgg", dict(depth=19, size=32, channels=3), 20_035_018, 2 * 398e6),
    ],
)
def test_published_sizes(name, fields, params, flops):
    config = default("images", name)
    config.model.update(fields)
    task = validate(config, devices=1)
    assert task.params == params and task.flops() == pytest.approx(flops, rel=0.01)


def test_sizes_are_checked():
    for name, change, message in (
        ("resnet_v1", {"depth": 19}, "6n \\+ 2"),
        ("resnet_v1", {"size": 30}, "divisible by 4"),
        ("resnet_v1", {"view": "chanel"}, "did you mean 'channel'"),
        ("vgg", {"depth": 12}, "one of 11, 13, 16, 19"),
        ("vgg", {"size": 48}, "divisible by 32"),
    ):
        config = default("images", name)
        config.model.update(change)
        with pytest.raises(ConfigError, match=message):
            validate(config, devices=1)
    with pytest.raises(ValueError, match="2 stages halve the side as often"):
        jax.eval_shape(CASES["vgg"][0].init, jax.random.key(0), jax.ShapeDtypeStruct((1, 6, 6, 1), jnp.float32))
