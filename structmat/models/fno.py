"""Fourier neural operators in one dimension or more (Li et al. 2021), with the block, factorised weights and multi-grid
patches of Kossaifi et al. 2023."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.models.attention import Structures
from structmat.models.coordinates import with_coordinates
from structmat.models.multigrid import margin_points, patch, stitch
from structmat.nn import StructuredDense
from structmat.nn.sites import Kind, pick, scope
from structmat.nn.spectral_conv import SpectralConv
from structmat.structures.errors import suggest

NORMS = ("none", "instance")
"""Of a layer: none, or every channel of every field to mean 0 and variance 1 over the points it sees, then a trained scale
and bias."""


def pointwise(
    x: jax.Array,
    name: str,
    features: int,
    structures: Structures,
    dtype: Any,
    axes: tuple[str, str],
    kind: Kind = "linear",
    use_bias: bool = True,
) -> jax.Array:
    """x `(..., channels)` -> `(..., features)` at every point, by the site `name` of the calling module."""
    layer = StructuredDense(
        features,
        structure=pick(structures, name),
        use_bias=use_bias,
        dtype=dtype,
        in_axes=axes[0],
        out_axes=axes[1],
        kind=kind,
        name=name,
    )
    return layer(x)


class Layer(nn.Module):
    """x `(batch, *space, width)` -> the same: sites spectral, skip, mlp_up, mlp_down.

    A Fourier layer beside a 1 x 1 skip, then an MLP at every point, of half the width, beside x scaled channel by channel;
    GELU after both, but for the last layer. Normalised are the Fourier layer's output, and the second sum before its GELU,
    where Kossaifi et al. 2023 do; the bias of a normalisation takes the place of the one before it.
    """

    modes: Sequence[int]
    last: bool
    dtype: Any
    structures: Structures
    norm: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        active = (lambda y: y) if self.last else nn.gelu
        linear = lambda y, name, features, axes, **how: pointwise(
            y, name, features, self.structures, self.dtype, axes, **how
        )
        plain = self.norm == "none"
        normed = lambda y, name: (
            y if plain else nn.InstanceNorm(dtype=self.dtype, use_fast_variance=False, name=name)(y)
        )
        y = active(normed(self.fourier(x), "norm1") + linear(x, "skip", width, ("embed", "embed"), use_bias=False))
        y = linear(y, "mlp_up", max(1, width // 2), ("embed", "mlp"))
        y = linear(nn.gelu(y), "mlp_down", width, ("mlp", "embed"), use_bias=plain)
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        return active(normed(y + self.param("gate", ones, (width,), jnp.float32).astype(x.dtype) * x, "norm2"))

    def fourier(self, x: jax.Array) -> jax.Array:
        """The site `spectral`: x `(batch, *space, width)` -> the same."""
        return SpectralConv(**self.sizes(x.shape[-1]))(x)

    def sizes(self, width: int) -> dict[str, Any]:
        """Arguments of a SpectralConv."""
        structure = pick(self.structures, "spectral")
        own = dict(features=width, modes=tuple(self.modes), structure=structure, dtype=self.dtype)
        own["use_bias"] = self.norm == "none"
        return own | dict(in_axes="embed", out_axes="embed", name="spectral")


class FNO(nn.Module):
    """x `(batch, *space, channels)` on a periodic grid -> `(batch, *space, features)` f32, one operator on any grid.

    Sites: lift_up (kind `conv`: its input is not of the width), lift_down, layers_i/{spectral, skip, mlp_up, mlp_down} of
    kinds `spectral` and `linear`, project_up, head. A bare structure is for kind `linear`; factorised spectral weights are
    chosen by rules such as `layers_.*/spectral -> tucker(rank=8)`.

    Attributes:
      features: output channels.
      width: hidden channels. layers: Fourier layers.
      modes: frequencies per axis, both signs; their number is the number of axes. See SpectralConv.
      grid: whether the coordinates of each point, in [0, 1), are appended to its channels. Without them the operator
        commutes with shifts of the grid.
      levels, margin: of multi-grid patches (structmat.models.multigrid): 2^levels per axis, the margin a fraction of the
        whole side. The layers see patches, whose windows have their coordinates in the domain; the output is stitched.
        Under a mesh the patches are split as the batch is.
      padding: for fields that are not periodic: zeros on either side of every axis between the lift and the projection, this
        fraction of the side, so that what leaves a layer at one end does not enter at the other. Not with levels or margin,
        which read the domain as a torus.
      norm: of the layers, one of NORMS.
      structures: layer path -> structure, from `structmat.nn.assign`.
      dtype: of products at points; transforms are in f32, parameters f32 and complex64.
    """

    features: int = 1
    width: int = 32
    layers: int = 4
    modes: Sequence[int] = (12, 12)
    grid: bool = True
    levels: int = 0
    margin: float = 0.0
    padding: float = 0.0
    norm: str = "none"
    structures: Structures = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        axes = len(self.modes)
        if x.ndim != axes + 2:
            raise ValueError(f"modes={tuple(self.modes)} need an input (batch, {axes} axes, channels), got {x.shape}")
        if self.norm not in NORMS:
            raise ValueError(f"FNO: no norm {self.norm!r}" + suggest(self.norm, NORMS))
        margins = margin_points(self.margin, x.shape[1:-1])
        around = margin_points(self.padding, x.shape[1:-1], "padding")
        cut = self.levels > 0 or any(margins)
        if cut and any(around):
            raise ValueError(
                f"padding={self.padding} is for a domain with ends, levels={self.levels} and margin={self.margin} for a torus"
            )
        x = with_coordinates(x) if self.grid else x  # of the domain: a patch knows where it is
        x = patch(x, self.levels, margins) if cut else x
        x = nn.with_logical_constraint(x, ("batch", *(None,) * axes, "features")).astype(self.dtype)
        own = dict(structures=self.structures, dtype=self.dtype)
        x = pointwise(x, "lift_up", 2 * self.width, axes=("features", "mlp"), kind="conv", **own)
        x = pointwise(nn.gelu(x), "lift_down", self.width, axes=("mlp", "embed"), **own)
        x = jnp.pad(x, ((0, 0), *((p, p) for p in around), (0, 0))) if any(around) else x
        for i in range(self.layers):
            name = f"layers_{i}"
            last, structures = i == self.layers - 1, scope(self.structures, name)
            fields = dict(modes=self.modes, norm=self.norm, dtype=self.dtype, structures=structures)
            x = self.layer(last=last, name=name, **fields)(x)
        x = x[(slice(None), *(slice(p, n - p) for p, n in zip(around, x.shape[1:-1])))]
        x = pointwise(x, "project_up", 2 * self.width, axes=("embed", "mlp"), **own)
        x = pointwise(nn.gelu(x), "head", self.features, axes=("mlp", "features"), kind="head", **own)
        return (stitch(x, self.levels, margins) if cut else x).astype(jnp.float32)

    def layer(self, **fields: Any) -> nn.Module:
        """One of the layers."""
        return Layer(**fields)
