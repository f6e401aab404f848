"""Phantoms made of ellipses, at any resolution: Shepp-Logan, and random ones of which every seed is another.

An ellipse is (value, semi-axis x, semi-axis y, centre x, centre y, degrees) in the square [-1, 1]^2: x to the right, y up,
rotated counterclockwise. Pixels are squares, row 0 on top; a pixel is the mean of `oversample`^2 points in it.
"""

from __future__ import annotations

import numpy as np

from structmat.data.errors import DataError

SHEPP_LOGAN = np.array(
    [
        (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
        (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0),
        (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
        (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
        (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
        (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
        (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
        (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
        (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
        (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
    ]
)
"""The head of Shepp and Logan 1974 with the contrast of Toft 1996; values add."""

ECHOES = 2
"""E1 and E2: the second is darker by a factor of its own in every ellipse, as by T2 decay."""
FEWEST, MOST = 8, 16
"""Ellipses within the head of a random phantom."""
DARKEST = 0.3
"""Least factor from E1 to E2."""


def inside(ellipse: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """bool: whether the points (x, y), broadcast, are in the ellipse (6,), its edge included."""
    _, a, b, x0, y0, degrees = ellipse
    turn = np.deg2rad(degrees)
    along = (x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)
    across = (y - y0) * np.cos(turn) - (x - x0) * np.sin(turn)
    return (along / a) ** 2 + (across / b) ** 2 <= 1


def shepp_logan(size: int, oversample: int = 4) -> np.ndarray:
    """float32 (size, size): the modified Shepp-Logan phantom, values in [0, 1].

    Raises:
      DataError: size or oversample below 1.
    """
    x, y = _points(size, oversample)
    total = np.zeros((size * oversample,) * 2)
    for ellipse in SHEPP_LOGAN:
        total += ellipse[0] * inside(ellipse, x, y)
    return _pixels(total, oversample)


def random_phantom(size: int, seed: int, oversample: int = 4) -> np.ndarray:
    """float32 (ECHOES, size, size), values in [0, 1]: two contrasts of one random object, the same at every size.

    A head with a brighter rim and FEWEST to MOST ellipses within it, each painted over those before it with a density in
    [0.1, 1]; E2 is the density times the ellipse's factor in [DARKEST, 1].

    Raises:
      DataError: size or oversample below 1, or a negative seed.
    """
    if seed < 0:
        raise DataError(f"a phantom's seed must be at least 0, got {seed}")
    x, y = _points(size, oversample)
    echoes = np.zeros((ECHOES, size * oversample, size * oversample))
    ellipses, factors = random_ellipses(seed)
    within = inside(ellipses[1], x, y)
    for i, (ellipse, factor) in enumerate(zip(ellipses, factors)):
        here = inside(ellipse, x, y) & (within | (i == 0))
        echoes[0][here], echoes[1][here] = ellipse[0], ellipse[0] * factor
    return _pixels(echoes, oversample)


def random_ellipses(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ellipses (n, 6) in the order they are painted, and the factor (n,) of each from E1 to E2."""
    draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
    a, b, tilt = draw.uniform(0.6, 0.8), draw.uniform(0.75, 0.92), draw.uniform(-15, 15)
    rim = draw.uniform(0.04, 0.1)
    ellipses = [(draw.uniform(0.8, 1), a, b, 0, 0, tilt), (draw.uniform(0.2, 0.5), a - rim, b - rim, 0, 0, tilt)]
    for _ in range(draw.integers(FEWEST, MOST + 1)):
        axes = np.exp(draw.uniform(np.log(0.03), np.log(0.3), 2))
        reach, angle = 0.75 * np.sqrt(draw.uniform()), draw.uniform(0, 2 * np.pi)
        centre = reach * (a - rim) * np.cos(angle), reach * (b - rim) * np.sin(angle)
        ellipses.append((draw.uniform(0.1, 1), *axes, *centre, draw.uniform(-90, 90)))
    return np.array(ellipses), draw.uniform(DARKEST, 1, len(ellipses))


def _points(size: int, oversample: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, n) and y (n, 1) of n = size * oversample points a side."""
    if size < 1 or oversample < 1:
        raise DataError(f"a phantom's size is {size} and oversample {oversample}; both must be at least 1")
    n = size * oversample
    x = (2 * np.arange(n) + 1) / n - 1
    return x[None, :], -x[:, None]


def _pixels(fine: np.ndarray, oversample: int) -> np.ndarray:
    size = fine.shape[-1] // oversample
    return fine.reshape(*fine.shape[:-2], size, oversample, size, oversample).mean((-3, -1)).astype(np.float32)
