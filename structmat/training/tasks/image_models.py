"""The models of images: the fields of each in a config, how it is built from them, and what its sites multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from structmat.models import Mixer, ResNet, ViT
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
    if m.view not in get_args(View):
        raise ConfigError("model.view", m.view, "no such view" + suggest(m.view, get_args(View)))


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
}
