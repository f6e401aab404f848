"""The models of images: the fields of each in a config, how it is built from them, and what its sites multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from structmat.models import VGG, Mixer, ResNet, ResNetV1, ViT
from structmat.models.resnet_v1 import VGG_STAGES, stages_of
from structmat.models.vit import POOLS
from structmat.structures.convolution import View
from structmat.structures.errors import suggest
from structmat.training.errors import ConfigError
from structmat.training.model_choice import ModelChoice, at_least_one, divides

VIT_SIZES = ("classes", "size", "patch", "channels", "layers", "width", "heads", "mlp_ratio")
MIXER_SIZES = ("classes", "size", "patch", "channels", "layers", "width", "tokens_hidden", "mlp_ratio")
RESNET_SIZES = ("classes", "size", "channels", "width", "stages", "blocks")
SHARED = dict(
    classes=10,
    size=8,  # side of the images, in pixels
    channels=1,
    dropout=0.0,
    dtype="float32",  # compute dtype; parameters stay float32
)


@dataclasses.dataclass(frozen=True)
class ImageModel(ModelChoice):
    """A model with what its FLOPs are counted from.

    Attributes:
      rows: (config) -> (site path) -> rows it multiplies for one image.
      other_flops: (config) -> FLOPs of a forward pass per image outside the sites.
    """

    rows: Callable[[Any], Callable[[str], int]]
    other_flops: Callable[[Any], int]


def check_vit(config: Any) -> None:
    """Refuse sizes no ViT can have."""
    m = config.model
    at_least_one(m, VIT_SIZES)
    divides(m, "patch", "size")
    divides(m, "heads", "width")
    if m.pool not in POOLS:
        raise ConfigError("model.pool", m.pool, "no such pooling" + suggest(m.pool, POOLS))


def build_vit(config: Any) -> ViT:
    """The module."""
    m = config.model
    fields = (*VIT_SIZES, "pool", "dropout", "scan", "remat")
    return ViT(**{name: m[name] for name in fields}, dtype=jnp.dtype(m.dtype))


def vit_tokens(m: Any) -> int:
    """Patches, and the class token where there is one."""
    return (m.size // m.patch) ** 2 + (m.pool == "token")


def vit_rows(config: Any) -> Callable[[str], int]:
    """Tokens, but for the patches and the head."""
    m = config.model
    other = {"patches": (m.size // m.patch) ** 2, "head": 1}
    return lambda path: other.get(path, vit_tokens(m))


def check_mixer(config: Any) -> None:
    """Refuse sizes no mixer can have."""
    at_least_one(config.model, MIXER_SIZES)
    divides(config.model, "patch", "size")


def build_mixer(config: Any) -> Mixer:
    """The module."""
    m = config.model
    return Mixer(**{name: m[name] for name in (*MIXER_SIZES, "dropout", "scan", "remat")}, dtype=jnp.dtype(m.dtype))


def mixer_rows(config: Any) -> Callable[[str], int]:
    """Patches, but for the head and for the MLPs across patches, which see one row for each channel."""
    m = config.model

    def rows(path: str) -> int:
        return 1 if path == "head" else m.width if "/tokens/" in path else (m.size // m.patch) ** 2

    return rows


def check_resnet(config: Any) -> None:
    """Refuse sizes no ResNet can have."""
    m = config.model
    at_least_one(m, RESNET_SIZES)
    if m.size % 2 ** (m.stages - 1):
        most = next(n for n in range(m.stages, 0, -1) if m.size % 2 ** (n - 1) == 0)
        raise ConfigError("model.stages", m.stages, f"must halve model.size={m.size} evenly", f"{most} does")
    check_view(m)


def build_resnet(config: Any) -> ResNet:
    """The module."""
    m = config.model
    fields = ("classes", "width", "stages", "blocks", "view", "dropout")
    return ResNet(**{name: m[name] for name in fields}, dtype=jnp.dtype(m.dtype))


def resnet_rows(config: Any) -> Callable[[str], int]:
    """Positions of a convolution's output; one for the head."""
    m = config.model

    def rows(path: str) -> int:
        first, *_ = path.split("/")
        if first == "head":
            return 1
        stage = int(first.removeprefix("layers_")) // m.blocks if first != "stem" else 0
        return (m.size // 2**stage) ** 2

    return rows


CLASSIC = dict(
    {name: value for name, value in SHARED.items() if name != "dropout"},
    view="channel",  # channel | spatial | decoupled: which matrix of a kernel is structured
)
"""Fields of the models with batch normalisation."""


def check_view(m: Any) -> None:
    """Refuse a view that is none."""
    if m.view not in get_args(View):
        raise ConfigError("model.view", m.view, "no such view" + suggest(m.view, get_args(View)))


def check_resnet_v1(config: Any) -> None:
    """Refuse sizes no ResNetV1 can have."""
    m = config.model
    at_least_one(m, ("classes", "size", "channels", "width"))
    try:
        blocks, _ = stages_of(m.depth)
    except ValueError as error:
        raise ConfigError("model.depth", m.depth, str(error)) from None
    halvings = len(blocks) - 1 + 2 * m.large
    if m.size % 2**halvings:
        raise ConfigError(
            "model.size",
            m.size,
            f"must be divisible by {2**halvings}, as often as this depth halves it",
            f"{2**halvings} is",
        )
    check_view(m)


def build_resnet_v1(config: Any) -> ResNetV1:
    """The module."""
    m = config.model
    blocks, bottleneck = stages_of(m.depth)
    return ResNetV1(m.classes, m.width, blocks, bottleneck, m.large, m.view, dtype=jnp.dtype(m.dtype))


def check_vgg(config: Any) -> None:
    """Refuse sizes no VGG can have."""
    m = config.model
    at_least_one(m, ("classes", "size", "channels", "width"))
    if m.depth not in VGG_STAGES:
        raise ConfigError("model.depth", m.depth, f"must be one of {', '.join(map(str, VGG_STAGES))}", "19 is")
    if m.size % 32:
        raise ConfigError("model.size", m.size, "must be divisible by 32, which the five stages make 1 of", "32 is")
    check_view(m)


def build_vgg(config: Any) -> VGG:
    """The module."""
    m = config.model
    return VGG(m.classes, m.width, VGG_STAGES[m.depth], m.view, dtype=jnp.dtype(m.dtype))


def conv_rows(build: Callable[[Any], ResNetV1 | VGG]) -> Callable[[Any], Callable[[str], int]]:
    """The `rows` of a model: positions of a convolution's output; one for the head."""

    def rows(config: Any) -> Callable[[str], int]:
        model = build(config)
        return lambda path: 1 if path == "head" else model.positions(path, config.model.size)

    return rows


MODELS = {
    "vit": ImageModel(
        fields=dict(
            SHARED,
            patch=2,  # side of a patch
            layers=2,
            width=64,
            heads=4,
            mlp_ratio=4,
            pool="token",  # token | mean: what the head reads
            scan=True,  # stack and scan equal adjacent layers: compiles faster
            remat="none",  # none | full | dots: recompute activations in the backward pass
        ),
        check=check_vit,
        build=build_vit,
        base=lambda config: build_vit(config).clone(width=config.mup.base_width, heads=1),
        rows=vit_rows,
        other_flops=lambda config: config.model.layers * 4 * vit_tokens(config.model) ** 2 * config.model.width,
    ),
    "mixer": ImageModel(
        fields=dict(
            SHARED,
            patch=2,  # side of a patch
            layers=2,
            width=64,
            tokens_hidden=32,  # hidden units of the MLPs across patches
            mlp_ratio=4,
            scan=True,  # stack and scan equal adjacent layers: compiles faster
            remat="none",  # none | full | dots: recompute activations in the backward pass
        ),
        check=check_mixer,
        build=build_mixer,
        base=lambda config: build_mixer(config).clone(width=config.mup.base_width),
        rows=mixer_rows,
        other_flops=lambda config: 0,
    ),
    "resnet": ImageModel(
        fields=dict(
            SHARED,
            width=16,  # channels of the first stage; twice as many in each later one
            stages=2,
            blocks=1,  # of two 3 x 3 convolutions, in each stage
            view="channel",  # channel | spatial | decoupled: which matrix of a kernel is structured
        ),
        check=check_resnet,
        build=build_resnet,
        base=lambda config: build_resnet(config).clone(width=config.mup.base_width),
        rows=resnet_rows,
        other_flops=lambda config: 0,
    ),
    "resnet_v1": ImageModel(
        fields=dict(
            CLASSIC,
            depth=20,  # 18, 34, 50, 101, 152 or 6n + 2: published layouts
            width=16,  # channels of the first stage; twice as many in each later one
            large=False,  # stem of 7 x 7 and a maximum that quarter the side, for images of 224
        ),
        check=check_resnet_v1,
        build=build_resnet_v1,
        base=lambda config: build_resnet_v1(config).clone(width=config.mup.base_width),
        rows=conv_rows(build_resnet_v1),
        other_flops=lambda config: 0,
    ),
    "vgg": ImageModel(
        fields=dict(
            CLASSIC | dict(size=32),
            depth=19,  # 11, 13, 16, 19: published layouts
            width=64,  # channels of the first stage; twice as many in each later one, up to eight times
        ),
        check=check_vgg,
        build=build_vgg,
        base=lambda config: build_vgg(config).clone(width=config.mup.base_width),
        rows=conv_rows(build_vgg),
        other_flops=lambda config: 0,
    ),
}
