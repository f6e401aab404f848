"""A small equivariant network of atoms whose messages are Clebsch-Gordan products of features and directions."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.tdn_clusters import CUTOFF, edges
from structmat.nn.tensor_product import TensorProduct
from structmat.structures.clebsch_gordan import block, clebsch_gordan, paths, width
from structmat.structures.path_factors import PathFactors

RADIAL, HIDDEN, NEIGHBOURS = 8, 32, 5.0
"""Functions of the distance, units of the networks of it and of the energy, neighbours a sum is scaled by."""


def harmonics(directions: jax.Array, lmax: int) -> jax.Array:
    """Unit vectors (..., 3) as x, y, z -> real spherical harmonics (..., (lmax+1)^2) in the order and signs of
    `structmat.structures.clebsch_gordan`, sum of squares 2l+1 in degree l."""
    first = directions[..., jnp.array([1, 2, 0])]
    parts = [jnp.ones((*directions.shape[:-1], 1), directions.dtype), first]
    pole = [np.ones(1), np.array([0.0, 1.0, 0.0])]
    for l in range(2, lmax + 1):
        c = clebsch_gordan(l - 1, 1, l)
        pole.append(np.einsum("abc,a,b->c", c, pole[-1], pole[1]))
        scale = 1 / np.linalg.norm(pole[-1])
        pole[-1] = pole[-1] * scale
        parts.append(jnp.einsum("abc,...a,...b->...c", jnp.asarray(c * scale, directions.dtype), parts[-1], first))
    return jnp.concatenate([math.sqrt(2 * l + 1) * part for l, part in enumerate(parts[: lmax + 1])], -1)


class Mix(nn.Module):
    """x `(..., channels, (lmax+1)^2)` -> the same: channels joined by a matrix for every degree."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, lmax = x.shape[-2], math.isqrt(x.shape[-1]) - 1
        init = nn.initializers.normal(1 / math.sqrt(channels))
        w = self.param("kernel", init, (lmax + 1, channels, channels))
        return jnp.concatenate([jnp.einsum("...ui,uv->...vi", x[..., block(l)], w[l]) for l in range(lmax + 1)], -1)


class Network(nn.Module):
    """positions (n, 3), here (n,) of one cluster -> its energy ().

    Every atom starts with one trained vector of scalars. A layer adds to each atom's features the mean of its neighbours'
    products with the spherical harmonics of the direction to them (`TensorProduct`, mode uvu), weights a network of the
    distance; then gates every degree by scalars. The energy is a network of each atom's scalars and sums of squares.

    Attributes:
      lmax: highest degree throughout. channels: of every degree. layers: of messages.
      shared, factors: of the products, see `TensorProduct`.
    """

    lmax: int = 2
    channels: int = 16
    layers: int = 2
    shared: bool = True
    factors: PathFactors | None = None

    @nn.compact
    def __call__(self, positions: jax.Array, here: jax.Array) -> jax.Array:
        n, d = len(positions), width(self.lmax)
        vectors, lengths, near = edges(positions, here)
        directions = harmonics(vectors / lengths[..., None], self.lmax)[:, :, None]
        centres = jnp.linspace(0.6, CUTOFF, RADIAL)
        basis = jnp.exp(-(((lengths[..., None] - centres) * RADIAL / 1.4) ** 2))
        count = len(paths(*(self.lmax,) * 3))
        shape = (self.channels, 1) if self.shared else (count, self.channels, 1)
        start = self.param("atom", nn.initializers.normal(1.0), (self.channels,))
        h = jnp.zeros((n, self.channels, d)).at[..., 0].set(start)
        degrees = np.repeat(np.arange(self.lmax + 1), 2 * np.arange(self.lmax + 1) + 1)
        for i in range(self.layers):
            radial = nn.Dense(HIDDEN, name=f"radial_{i}")(basis)
            weights = nn.Dense(math.prod(shape), name=f"weights_{i}")(nn.silu(radial)).reshape(n, n, *shape)
            weights = weights * near.reshape(n, n, *(1,) * len(shape))
            product = TensorProduct(mode="uvu", shared=self.shared, factors=self.factors, name=f"product_{i}")
            neighbours = jnp.broadcast_to(h[None], (n, *h.shape))
            messages = product(neighbours, directions, weights).sum(1) / math.sqrt(NEIGHBOURS)
            h = Mix(name=f"own_{i}")(h) + Mix(name=f"messages_{i}")(messages)
            gates = nn.Dense(self.channels * (self.lmax + 1), name=f"gates_{i}")(h[..., 0])
            h = h * nn.sigmoid(gates.reshape(n, self.channels, -1))[..., degrees]
        squares = [jnp.sum(h[..., block(l)] ** 2, -1) for l in range(1, self.lmax + 1)]
        seen = jnp.concatenate([h[..., 0], *squares], -1)
        each = nn.Dense(1, name="energy")(nn.silu(nn.Dense(HIDDEN, name="invariants")(seen)))[..., 0]
        return jnp.sum(each * here)
