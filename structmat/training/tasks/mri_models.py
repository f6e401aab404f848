"""The models of MRI reconstruction: the fields of each in a config, how it is built, and how it makes an image of a scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from structmat.data.mri.phantoms import ECHOES
from structmat.models.msense import MSense
from structmat.models.sense import zero_filled
from structmat.models.unet import UNet
from structmat.structures.fft import fft_flops
from structmat.training.applied import applied
from structmat.training.model_choice import ModelChoice
from structmat.training.task import Batch, Variables
from structmat.training.tasks.unet_model import build_unet, check_unet, unet_fields, unet_positions

PARTS = 2
"""Channels of a complex image: real and imaginary."""
Image = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class ReconstructionModel(ModelChoice):
    """A model with what it is called on.

    Attributes:
      example: (config) -> shapes of its positional arguments.
      rows: (config) -> (site path) -> rows it multiplies for one scan, which is ECHOES images.
      other_flops: (config) -> FLOPs of a forward pass per scan outside the sites: the transforms that are not learned.
      image: (model, variables, batch, rng, train) -> complex (scans, ECHOES, h, w), and the auxiliary terms of structures.
    """

    example: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    rows: Callable[[Any], Callable[[str], int]]
    other_flops: Callable[[Any], int]
    image: Callable[[Any, Variables, Batch, jax.Array | None, bool], Image]


def measured(batch: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """k-space `(n, ECHOES, coils, h, w)`, maps `(n, 1, coils, h, w)` and mask `(n, 1, 1, h, w)` of a batch of scans."""
    return batch["kspace"], batch["maps"][:, None], batch["mask"][:, None, None]


def msense_example(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """As `measured` gives them."""
    n, coils, side = config.batch, config.data.coils, (config.data.size,) * 2
    complex64 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.complex64)
    return (
        complex64(n, ECHOES, coils, *side),
        complex64(n, 1, coils, *side),
        jax.ShapeDtypeStruct((n, 1, 1, *side), jnp.bool_),
    )


def msense_image(model: MSense, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool) -> Image:
    """Its output; its transforms have no auxiliary terms."""
    return model.apply(variables, *measured(batch)), {}


def build(config: Any) -> UNet:
    """The U-Net."""
    return build_unet(config, PARTS, "SAME")


def unet_rows(config: Any) -> Callable[[str], int]:
    """Positions in all images of a scan."""
    positions = unet_positions(config.model.depth, config.data.size)
    return lambda path: ECHOES * positions(path)


def unet_image(model: UNet, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool) -> Image:
    """Of the zero-filled image, every echo apart, real and imaginary part as channels."""
    start = zero_filled(*measured(batch))
    channels = jnp.stack([start.real, start.imag], -1)
    out, extra = applied(model, variables, channels.reshape(-1, *channels.shape[2:]), rng, train)
    real, imaginary = jnp.moveaxis(out.reshape(channels.shape), -1, 0)
    return jax.lax.complex(real, imaginary), extra


MODELS = {
    "msense": ReconstructionModel(
        fields={},  # it computes in complex64
        check=lambda config: None,
        build=lambda config: MSense(),
        base=lambda config: MSense(),
        example=msense_example,
        rows=lambda config: lambda path: ECHOES * config.data.coils * config.data.size,
        other_flops=lambda config: 0,
        image=msense_image,
    ),
    "unet": ReconstructionModel(
        fields=unet_fields(residual=True),
        check=lambda config: check_unet(config, "size"),
        build=build,
        base=lambda config: build(config).clone(width=config.mup.base_width),
        example=lambda config: (
            jax.ShapeDtypeStruct((ECHOES * config.batch, *(config.data.size,) * 2, PARTS), jnp.float32),
        ),
        rows=unet_rows,
        other_flops=lambda config: fft_flops(ECHOES * config.data.coils * 2 * config.data.size, config.data.size),
        image=unet_image,
    ),
}
"""mSENSE has no width: its own base. Sites that no rule matches, or where `structure` is dense(), are dense complex matrices,
full learnable Fourier transforms."""
