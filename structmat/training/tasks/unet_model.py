"""The choice `unet` of tasks on square images, less what each task counts and calls it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from structmat.models import UNet
from structmat.structures.convolution import View
from structmat.structures.errors import suggest
from structmat.training.errors import ConfigError
from structmat.training.model_choice import at_least_one


def unet_fields(residual: bool) -> dict[str, Any]:
    """`config.model` less `name`."""
    return dict(
        dtype="float32",  # compute dtype; parameters stay float32
        width=16,  # channels at the top; twice as many after each halving
        depth=3,  # halvings of the side
        residual=residual,  # predict what to add to the input, else the output itself
        view="channel",  # channel | spatial | decoupled: which matrix of a kernel is structured
    )


def check_unet(config: Any, side: str) -> None:
    """Refuse sizes no U-Net can have; `side` is the field of `config.data` with the images' side."""
    m, size = config.model, config.data[side]
    at_least_one(m, ("width", "depth"))
    if size % 2**m.depth:
        most = next((n for n in range(m.depth, 0, -1) if size % 2**n == 0), 0)
        hint = f"{most} does" if most else f"data.{side} must be even"
        raise ConfigError("model.depth", m.depth, f"must halve data.{side}={size} evenly", hint)
    check_view(m)


def check_view(m: Any) -> None:
    """Refuse a view of convolutions that does not exist."""
    if m.view not in get_args(View):
        raise ConfigError("model.view", m.view, "no such view" + suggest(m.view, get_args(View)))


def build_unet(config: Any, features: int, padding: str) -> UNet:
    """The module."""
    fields = {name: config.model[name] for name in ("width", "depth", "residual", "view")}
    return UNet(
        features, padding=padding, grid=config.model.get("grid", False), dtype=jnp.dtype(config.model.dtype), **fields
    )


def unet_positions(depth: int, side: int) -> Callable[[str], int]:
    """(site path) -> positions of the convolution's output in one image."""

    def positions(path: str) -> int:
        first, _, level = path.split("/")[0].partition("_")
        return (side // 2 ** (depth if first == "middle" else int(level or 0))) ** 2

    return positions
