"""ResNet against Flax's own convolutions, its sizes, and what its sites are said to multiply."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.models import FieldResNet, ResNet
from structmat.models.resnet import GROUPS
from structmat.nn import assign, site_params, sites
from structmat.structures import StructureError
from structmat.structures.convolution import kernel_of
from structmat.training import loop
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from structmat.training.state import abstract_variables
from structmat.training.tasks.image_models import resnet_rows
from tests.marks import mostly_long
from tests.models.helpers import shaken
from tests.training.test_options import equations

SIZES = dict(classes=5, width=6, stages=2, blocks=1)
EXAMPLE = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
LOW = {
    "channel": "low_rank(rank=2)",
    "spatial": "low_rank(rank=2)",
    "decoupled": "block_low_rank(in_blocks=1, out_blocks={cout}, rank=1)",
}

TRACED = [
    ("channel", "layers_.*/conv. -> low_rank(rank=2)", "factored"),
    ("channel", "layers_0/conv. -> kronecker(); layers_1/conv1 -> low_rank(rank=16)", "dense"),
    ("spatial", "layers_.*/conv. -> low_rank(rank=2)", "factored"),
    ("spatial", "layers_.*/conv. -> channel_sparse(density=0.25)", "dense"),
    ("decoupled", "layers_.*/conv. -> low_rank(rank=2)", "factored"),
    ("decoupled", "layers_0/conv. -> block_low_rank(in_blocks=1, out_blocks=8, rank=1)", "factored"),
]


def reference(model, variables, x):
    """Logits by Flax's modules; structured weights only as kernels."""
    table, params = sites(model, EXAMPLE), variables["params"]

    def own(path):
        node = params
        for part in path.split("/"):
            node = node[part]
        return node

    def conv(x, path):
        bound = table[path].bound
        size, cout = 1 if path.endswith("shortcut") else 3, own(path)["bias"].size
        matrix = bound.materialize(site_params(variables, path, table[path]))
        kernel = kernel_of(matrix, model.view, (size, size), x.shape[-1], cout)
        return nn.Conv(cout, (size, size)).apply({"params": {"kernel": kernel, "bias": own(path)["bias"]}}, x)

    active = lambda x, path: nn.relu(nn.GroupNorm(math.gcd(x.shape[-1], GROUPS)).apply({"params": own(path)}, x))
    x = conv(x, "stem")
    for i in range(2):
        if i == 1:
            x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        y = active(x, f"layers_{i}/norm1")
        skip = conv(y, "layers_1/shortcut") if i == 1 else x
        y = active(conv(y, f"layers_{i}/conv1"), f"layers_{i}/norm2")
        x = skip + conv(y, f"layers_{i}/conv2")
    x = active(x, "norm").mean((1, 2))
    return x @ own("head")["kernel"] + own("head")["bias"]


@pytest.mark.parametrize("view", mostly_long([*LOW], ["spatial"]))
def test_logits_equal_the_plain_network(view):
    images = jax.random.normal(jax.random.key(1), EXAMPLE.shape)
    rules = f"layers_0/conv. -> {LOW[view].format(cout=6)}; layers_1/.* -> {LOW[view].format(cout=12)}"
    model = assign(ResNet(**SIZES, view=view), rules, EXAMPLE)
    held = shaken(model, images)
    logits, expected = (jax.jit(f)(held, images) for f in (model.apply, lambda v, x: reference(model, v, x)))
    assert logits.dtype == jnp.float32 and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())


def test_a_field_goes_through_the_plain_network():
    """And its shift through to the shift of what comes out."""
    x = np.random.default_rng(1).normal(size=(2, 6, 4, 3)).astype(np.float32)
    model = assign(FieldResNet(features=2, width=6, blocks=2), "layers_1/conv2 -> low_rank(rank=3)", x)
    held, table = shaken(model, x), sites(model, x)

    def plain(variables, y):
        params = variables["params"]

        def conv(y, *path):
            own, site = params, table["/".join(path)]
            for part in path:
                own = own[part]
            matrix = site.bound.materialize(site_params(variables, "/".join(path), site))
            kernel = kernel_of(matrix, "channel", (3, 3), y.shape[-1], 6)
            module = nn.Conv(6, (3, 3), padding="CIRCULAR")
            return module.apply({"params": {"kernel": kernel, "bias": own["bias"]}}, y)

        active = lambda y, own: nn.relu(nn.GroupNorm(2).apply({"params": own}, y))  # 2: of gcd(6, 4)
        y = conv(y, "stem")
        for name in ("layers_0", "layers_1"):
            z = conv(active(y, params[name]["norm1"]), name, "conv1")
            y = y + conv(active(z, params[name]["norm2"]), name, "conv2")
        return active(y, params["norm"]) @ params["head"]["kernel"] + params["head"]["bias"]

    apply = jax.jit(model.apply)
    got, expected = apply(held, x), jax.jit(plain)(held, x)
    assert got.dtype == jnp.float32 and got.shape == (2, 6, 4, 2) and np.abs(expected).max() > 0.5
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(expected).max())
    near(got, expected)
    near(apply(held, np.roll(x, (1, -1), (1, 2))), np.roll(expected, (1, -1), (1, 2)))


def test_rules_reach_its_convolutions_by_name():
    table = sites(assign(ResNet(**SIZES), "layers_.*/conv. -> low_rank(rank=2)", EXAMPLE), EXAMPLE)
    low = {path for path, site in table.items() if site.bound.structure.name == "low_rank"}
    assert low == {f"layers_{i}/conv{c}" for i in range(2) for c in (1, 2)}
    assert {path: site.kind for path, site in table.items() if path not in low} == {
        "head": "head",
        "layers_1/shortcut": "conv",
        "stem": "conv",
    }
    assert table["layers_1/conv1"].bound.in_shape == (3, 3, 6) and table["layers_1/conv1"].bound.out_shape == (12,)
    with pytest.raises(StructureError, match="kind 'linear', and the model has none"):
        assign(ResNet(**SIZES), "low_rank(rank=2)", EXAMPLE)


def config_of(**model):
    config = default("images", "resnet")
    config.update(steps=30, batch=16, log_every=10)
    config.model.update(width=8, **model)
    config.mup.base_width = 8
    config.eval.batches = 2
    return config


@pytest.mark.parametrize(("width", "stages", "blocks"), mostly_long([(8, 1, 1), (10, 2, 1), (4, 3, 2)], [(4, 3, 2)]))
def test_parameters_and_flops_have_their_closed_forms(width, stages, blocks):
    config = config_of(stages=stages, blocks=blocks)
    config.model.width = width
    task = validate(config)
    params, flops, before, side = 9 * width + width, 9 * width * 64, width, 8
    for stage in range(stages):
        side = 8 // 2**stage
        for _ in range(blocks):
            after = width * 2**stage
            narrow = before != after
            entries = 9 * before * after + 9 * after**2 + narrow * before * after
            params += entries + (2 + narrow) * after + 2 * before + 2 * after
            flops, before = flops + entries * side**2, after
    assert task.params == params + 2 * before + 10 * before + 10
    assert task.flops() == task.flops(executed=True) == 2 * (flops + 10 * before)
    assert resnet_rows(config)(f"layers_{stages * blocks - 1}/conv2") == side**2


@pytest.mark.parametrize(
    ("view", "rules", "path"),
    mostly_long(TRACED, TRACED[::3]),
)
def test_flops_executed_are_those_of_the_traced_network(view, rules, path):
    config = config_of(view=view)
    config.structure = rules
    task = validate(config)
    shapes = nn.unbox(abstract_variables(task))
    traced = jax.make_jaxpr(task.model.apply)(shapes, *task.example)
    total = 0
    for equation in equations(traced.jaxpr):
        name, sides = equation.primitive.name, [v.aval.shape for v in equation.invars]
        if name == "conv_general_dilated":
            inner = math.prod(sides[1]) // sides[1][equation.params["dimension_numbers"].rhs_spec[0]]
        elif name == "dot_general":
            inner = math.prod(sides[0][d] for d in equation.params["dimension_numbers"][0][0])
        else:
            continue
        total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
    assert total == config.batch * task.flops(executed=True)
    assert {task.path_at(p) for p, s in task.table.items() if s.bound.structure.name != "dense"} == {path}
    assert task.path == path


def test_sizes_are_checked():
    for change, message in (
        ({"stages": 5}, r"model.stages = 5: must halve model.size=8 evenly; 4 does"),
        ({"view": "chanel"}, "did you mean 'channel'"),
        ({"blocks": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(config_of(**change))
    with pytest.raises(ValueError, match="stages=4 halve the side 3 times"):
        jax.eval_shape(ResNet(stages=4).init, jax.random.key(0), EXAMPLE)


@pytest.mark.long
def test_a_run_learns(tmp_path):
    config = config_of()
    config.update(steps=150, batch=32, structure="layers_.*/conv. -> low_rank(rank=4)")
    config.optim.lr = 0.01
    heldout = loop.train(config, tmp_path / "run").metrics["heldout"]
    assert heldout["loss"] < 1.5 < math.log(10) and heldout["accuracy"] > 0.5, heldout
