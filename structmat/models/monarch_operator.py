"""Monarch neural operator (Dao et al. 2022): a Fourier neural operator that learns its transforms too."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.models.attention import Structures
from structmat.models.fno import FNO, Layer
from structmat.nn.monarch_transform import MonarchTransform
from structmat.nn.sites import pick, scope
from structmat.nn.spectral_conv import SpectralConv, kept, low, padded
from structmat.structures import parse
from structmat.structures.dense import Dense
from structmat.structures.leaf import Shape


class MonarchSpectralConv(SpectralConv):
    """A SpectralConv whose transforms, one per axis and direction, are learned and start as the exact ones.

    Sites of kind `linear` forward_k and inverse_k for axis k, beside its own; they fix the grid. The inverse along the last
    axis reads frequencies 0 ... m // 2, twice those that a real signal has twice, and keeps the real part.

    Attributes:
      transform: structure of the transforms, see MonarchTransform; None is its own choice.
      structures: forward_k or inverse_k -> structure; where it is dense(), as for what no rule matches, `transform` holds.
    """

    transform: str | None = None
    structures: Structures = ()

    def analysis(self, x: jax.Array) -> jax.Array:
        last = len(self.modes)
        z = self.transformed(x, last, "forward")
        z = jax.lax.slice_in_dim(z, 0, kept(self.modes)[-1], axis=last)
        for axis in range(last - 1, 0, -1):
            z = low(self.transformed(z, axis, "forward"), self.modes[axis - 1], axis)
        return z

    def synthesis(self, spectrum: jax.Array, space: Shape) -> jax.Array:
        last = len(self.modes)
        for axis in range(1, last):
            spectrum = padded(spectrum, space[axis - 1], self.modes[axis - 1], axis)
            spectrum = self.transformed(spectrum, axis, "inverse")
        n, count = space[-1], kept(self.modes)[-1]
        times = np.where((2 * np.arange(count)) % n == 0, 1.0, 2.0).astype(np.float32)
        zeros = jnp.zeros((*spectrum.shape[:last], n - count, spectrum.shape[-1]), spectrum.dtype)
        spectrum = jnp.concatenate([spectrum * times[:, None], zeros], last)
        return self.transformed(spectrum, last, "inverse").real

    def transformed(self, z: jax.Array, axis: int, direction: str) -> jax.Array:
        """The site forward_k or inverse_k along axis k + 1 of z, both unitary at initialisation."""
        name = f"{direction}_{axis - 1}"
        chosen = parse(pick(self.structures, name))
        transform = MonarchTransform(
            z.shape[axis],
            inverse=direction == "inverse",
            norm="ortho",
            structure=self.transform if isinstance(chosen, Dense) else chosen,
            name=name,
        )
        return jnp.moveaxis(transform(jnp.moveaxis(z, axis, -1)), -1, axis)


class MonarchLayer(Layer):
    """A layer of an FNO with learned transforms: sites spectral/{forward_k, inverse_k} as well."""

    transform: str | None = None

    def fourier(self, x: jax.Array) -> jax.Array:
        inner = scope(self.structures, "spectral")
        return MonarchSpectralConv(**self.sizes(x.shape[-1]), transform=self.transform, structures=inner)(x)


class MonarchOperator(FNO):
    """An FNO with learned transforms, its equal at initialisation with the same other weights; bound to one grid.

    Attributes:
      transform: structure of all transforms, such as `monarch(blocks=4)`; None is a Monarch factor pair of slice rank 1,
        n (n / K + K) complex numbers per axis of length n, K about sqrt(n). A rule that matches a transform wins over it.
    """

    transform: str | None = None

    def layer(self, **fields: Any) -> nn.Module:
        return MonarchLayer(**fields, transform=self.transform)
