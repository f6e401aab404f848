"""The models of periodic fields in two dimensions: the fields of each in a config, how it is built, what its sites multiply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from structmat.models import FNO, FieldResNet, MonarchOperator, UNet
from structmat.models.fno import NORMS
from structmat.models.multigrid import margin_points
from structmat.nn.monarch_transform import bind_transform
from structmat.nn.spectral_conv import kept
from structmat.structures import StructureError
from structmat.structures.errors import suggest
from structmat.structures.fft import fft_flops
from structmat.training.errors import ConfigError
from structmat.training.model_choice import ModelChoice, at_least_one
from structmat.training.tasks.unet_model import build_unet, check_unet, check_view, unet_fields, unet_positions

FNO_SIZES = ("width", "layers", "modes")
SHARED = dict(
    dtype="float32",  # of products at points; transforms are in float32, parameters float32 and complex64
)


GRID = dict(
    grid=True,  # append the coordinates of each point to its channels: the force is not the same everywhere
)


@dataclasses.dataclass(frozen=True)
class OperatorModel(ModelChoice):
    """A model with what its FLOPs are counted from.

    Attributes:
      rows: (config) -> (site path) -> rows it multiplies for one field.
      other_flops: (config) -> FLOPs of a forward pass per field outside the sites: the transforms.
      any_grid: whether the same parameters apply on other grids.
    """

    rows: Callable[[Any], Callable[[str], int]]
    other_flops: Callable[[Any], int]
    any_grid: bool


def _modes_fit(m: Any, side: int) -> None:
    if m.modes > side:
        raise ConfigError("model.modes", m.modes, f"the layers see {side} points a side", f"at most {side} is valid")


# -- FNO -----------------------------------------------------------------------------------------------------------------


def check_fno(config: Any) -> None:
    """Refuse sizes and patches no FNO can have."""
    m, n = config.model, config.data.resolution
    at_least_one(m, FNO_SIZES)
    if m.levels < 0 or n % 4**m.levels:
        most = next(level for level in range(n.bit_length(), -1, -1) if n % 4**level == 0)
        raise ConfigError("model.levels", m.levels, f"4^levels must divide data.resolution={n}", f"0 to {most} do")
    if not 0 <= m.margin <= 1:
        raise ConfigError("model.margin", m.margin, "must be a fraction of the side in [0, 1]", "0.1 is")
    if not 0 <= m.padding <= 1:
        raise ConfigError("model.padding", m.padding, "must be a fraction of the side in [0, 1]", "0.1 is")
    if m.padding and (m.levels or m.margin):
        rule = f"model.levels={m.levels} and model.margin={m.margin} read the domain as a torus"
        raise ConfigError("model.padding", m.padding, rule, "0.0 is valid with them")
    if m.norm not in NORMS:
        raise ConfigError("model.norm", m.norm, "no such norm" + suggest(m.norm, NORMS))
    _modes_fit(m, side_of(config))


def build_fno(config: Any) -> FNO:
    """The module."""
    m = config.model
    own = {name: m[name] for name in ("width", "layers", "grid", "levels", "margin", "padding", "norm")}
    return FNO(**own, modes=(m.modes, m.modes), dtype=jnp.dtype(m.dtype))


def side_of(config: Any) -> int:
    """Points a side of what the layers see: a patch with its margins, or the domain with its padding."""
    m, n = config.model, config.data.resolution
    return n // 2**m.levels + 2 * margin_points(m.margin, (n,))[0] + 2 * margin_points(m.padding, (n,))[0]


def fno_rows(config: Any) -> Callable[[str], int]:
    """Points of all patches, in the layers with the padding; of a Fourier layer's weight, patches."""
    m, side = config.model, side_of(config)
    patches, padding = 4**m.levels, margin_points(m.padding, (config.data.resolution,))[0]

    def rows(path: str) -> int:
        if path.endswith("/spectral"):
            return patches
        return patches * (side if path.startswith("layers_") else side - 2 * padding) ** 2

    return rows


def fno_flops(config: Any) -> int:
    """Of the transforms: real along the last axis, then complex ones of the frequencies kept, and back."""
    m, side = config.model, side_of(config)
    one_way = fft_flops(side, side, real=True) + fft_flops(kept((m.modes, m.modes))[-1], side)
    return 4**m.levels * m.layers * m.width * 2 * one_way


# -- Monarch operator ----------------------------------------------------------------------------------------------------


def check_monarch(config: Any) -> None:
    """Refuse sizes and transforms no Monarch operator can have."""
    m, n = config.model, config.data.resolution
    at_least_one(m, FNO_SIZES)
    _modes_fit(m, n)
    try:
        bind_transform(n, structure=m.transform or None)
    except StructureError as error:
        raise ConfigError("model.transform", m.transform, str(error)) from None


def build_monarch(config: Any) -> MonarchOperator:
    """The module."""
    m = config.model
    own = {name: m[name] for name in ("width", "layers", "grid")}
    modes, transform = (m.modes, m.modes), m.transform or None
    return MonarchOperator(**own, modes=modes, transform=transform, dtype=jnp.dtype(m.dtype))


def monarch_rows(config: Any) -> Callable[[str], int]:
    """As an FNO's; of a transform, the channels of the other axis: all of it beside the last one, of the first the kept."""
    m, n = config.model, config.data.resolution
    lines = {"0": m.width * kept((m.modes, m.modes))[-1], "1": m.width * n}

    def rows(path: str) -> int:
        *_, name = path.split("/")
        if name.startswith(("forward_", "inverse_")):
            return lines[name[-1]]
        return 1 if name == "spectral" else n**2

    return rows


# -- U-Net and ResNet ----------------------------------------------------------------------------------------------------


def periodic_unet(config: Any) -> UNet:
    """The module."""
    return build_unet(config, 1, "CIRCULAR")


def check_resnet(config: Any) -> None:
    """Refuse sizes no ResNet can have."""
    at_least_one(config.model, ("width", "blocks"))
    check_view(config.model)


def build_resnet(config: Any) -> FieldResNet:
    """The module."""
    own = {name: config.model[name] for name in ("width", "blocks", "grid", "view")}
    return FieldResNet(**own, dtype=jnp.dtype(config.model.dtype))


MODELS = {
    "fno": OperatorModel(
        fields=dict(
            SHARED,
            width=32,  # hidden channels
            layers=3,
            modes=12,  # frequencies kept along each axis, of both signs
            **GRID,
            levels=0,  # of multi-grid patches: 2^levels a side
            margin=0.0,  # of the whole domain or of each patch, as a fraction of the whole side
            padding=0.0,  # zeros on either side, as a fraction of it, for fields that are not periodic
            norm="none",  # none | instance: of the layers
        ),
        check=check_fno,
        build=build_fno,
        base=lambda config: build_fno(config).clone(width=config.mup.base_width),
        rows=fno_rows,
        other_flops=fno_flops,
        any_grid=True,
    ),
    "monarch_operator": OperatorModel(
        fields=dict(
            SHARED,
            width=32,  # hidden channels
            layers=3,
            modes=12,  # frequencies kept along each axis, of both signs
            grid=True,  # append the coordinates of each point to its channels
            transform="",  # structure of the learned transforms; '' is a Monarch pair of slice rank 1
        ),
        check=check_monarch,
        build=build_monarch,
        base=lambda config: build_monarch(config).clone(width=config.mup.base_width),
        rows=monarch_rows,
        other_flops=lambda config: 0,
        any_grid=False,
    ),
    "unet": OperatorModel(
        fields=unet_fields(residual=False) | GRID,
        check=lambda config: check_unet(config, "resolution"),
        build=periodic_unet,
        base=lambda config: periodic_unet(config).clone(width=config.mup.base_width),
        rows=lambda config: unet_positions(config.model.depth, config.data.resolution),
        other_flops=lambda config: 0,
        any_grid=True,
    ),
    "resnet": OperatorModel(
        fields=dict(
            SHARED,
            width=32,  # hidden channels
            blocks=8,  # of two 3 x 3 convolutions
            **GRID,
            view="channel",  # channel | spatial | decoupled: which matrix of a kernel is structured
        ),
        check=check_resnet,
        build=build_resnet,
        base=lambda config: build_resnet(config).clone(width=config.mup.base_width),
        rows=lambda config: lambda path: config.data.resolution**2,
        other_flops=lambda config: 0,
        any_grid=True,
    ),
}
