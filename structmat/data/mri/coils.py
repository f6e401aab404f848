"""Smooth complex sensitivities of receiver coils around the object."""

from __future__ import annotations

import numpy as np

from structmat.data.errors import DataError

RADIUS, WIDTH, WINDING = 1.1, 0.8, 1.0
"""Of the ring of coils and of their Gaussian profiles, in half fields of view; largest phase slope, in radians over one."""


def coil_maps(size: int, coils: int = 8, seed: int = 0) -> np.ndarray:
    """complex64 (coils, size, size) with sum over coils |s|^2 = 1 at every pixel.

    Coil c sits on a ring of RADIUS, at equal angles from a random first one. Its magnitude is a Gaussian of the distance,
    its phase a random constant, slope and shear, all smooth; then all are divided by their root sum of squares.

    Raises:
      DataError: size or coils below 1, or a negative seed.
    """
    if size < 1 or coils < 1 or seed < 0:
        raise DataError(f"size is {size}, coils {coils}, seed {seed}; size and coils must be >= 1 and seed >= 0")
    draw = np.random.Generator(np.random.Philox(key=[seed, 1]))
    angles = 2 * np.pi * (np.arange(coils) + draw.uniform()) / coils
    constant, shear = draw.uniform(-np.pi, np.pi, coils), draw.uniform(-WINDING, WINDING, coils)
    slopes = draw.uniform(-WINDING, WINDING, (2, coils))
    grid = (2 * np.arange(size) + 1) / size - 1
    x, y = grid[None, None, :], -grid[None, :, None]
    column = lambda v: v[:, None, None]
    square = (x - column(RADIUS * np.cos(angles))) ** 2 + (y - column(RADIUS * np.sin(angles))) ** 2
    phase = column(constant) + column(slopes[0]) * x + column(slopes[1]) * y + column(shear) * x * y
    maps = np.exp(-square / (2 * WIDTH**2) + 1j * phase)
    return (maps / np.sqrt((np.abs(maps) ** 2).sum(0))).astype(np.complex64)
