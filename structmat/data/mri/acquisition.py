"""What coils measure: every coil's view of the image, Fourier transformed, sampled, with noise (Pruessmann et al. 1999)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from structmat.data.errors import DataError
from structmat.data.mri import masks
from structmat.data.mri.coils import coil_maps
from structmat.data.mri.phantoms import ECHOES, random_phantom

PATTERNS = ("poisson_disc", "random", "regular")


def forward(image: np.ndarray, maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A: image `(..., h, w)` -> k-space `(..., coils, h, w)`, zero where not sampled; the transform is unitary."""
    return mask * np.fft.fft2(maps * image[..., None, :, :], norm="ortho")


def adjoint(kspace: np.ndarray, maps: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A^H: k-space `(..., coils, h, w)` -> image `(..., h, w)`; A^H A = 1 where all is sampled."""
    return (maps.conj() * np.fft.ifft2(mask * kspace, norm="ortho")).sum(-3)


def noise_level(image: np.ndarray, snr: float) -> np.ndarray:
    """Standard deviation `(...)` of complex noise for image `(..., h, w)`: RMS of the image over 10^(snr / 20).

    `snr` in dB is then that of the fully sampled reconstruction, since A is isometric there.
    """
    return np.sqrt((np.abs(image) ** 2).mean((-2, -1))) * 10 ** (-snr / 20)


def acquire(image: np.ndarray, maps: np.ndarray, mask: np.ndarray, snr: float | None, seed: int) -> np.ndarray:
    """complex64 k-space `(..., coils, h, w)` of image `(..., h, w)` with white complex Gaussian noise at the samples taken.

    snr: see `noise_level`; None is without noise.
    """
    kspace = forward(image, maps, mask)
    if snr is not None:
        draw = np.random.Generator(np.random.Philox(key=[seed, 4]))
        white = (draw.standard_normal(kspace.shape) + 1j * draw.standard_normal(kspace.shape)) * np.sqrt(0.5)
        kspace = kspace + mask * white * noise_level(image, snr)[..., None, None, None]
    return kspace.astype(np.complex64)


@dataclass(frozen=True, eq=False)
class Scanner:
    """What all scans share: complex64 `maps` (coils, h, w), bool `mask` (h, w), and the SNR of each echo in dB, or None."""

    maps: np.ndarray
    mask: np.ndarray
    snr: tuple[float | None, ...]


def scanner(
    size: int,
    coils: int = 8,
    acceleration: float = 2.0,
    pattern: str = "poisson_disc",
    snr: tuple[float | None, ...] = (30.0, 25.0),
    seed: int = 0,
) -> Scanner:
    """Coils and a mask for images of side `size`.

    Args:
      pattern: `poisson_disc`, or lines that are `random` or `regular`.
      snr: one for each of the ECHOES of a phantom.

    Raises:
      DataError: another pattern, another number of SNRs, or what the parts refuse.
    """
    if pattern not in PATTERNS:
        raise DataError(f"pattern is {pattern!r}; valid: {', '.join(PATTERNS)}")
    if len(snr) != ECHOES:
        raise DataError(f"snr has {len(snr)} values, {snr}; one for each of {ECHOES} echoes is needed")
    shape = (size, size)
    if pattern == "poisson_disc":
        mask, _ = masks.poisson_disc(shape, acceleration, seed)
    else:
        mask = masks.lines(shape, acceleration, seed, pattern=pattern)
    return Scanner(coil_maps(size, coils, seed), mask, tuple(snr))


def scans(machine: Scanner, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """`{"kspace": complex64 (n, ECHOES, coils, h, w), "image": float32 (n, ECHOES, h, w)}`, a random phantom per seed.

    E1 and E2 are two contrasts of the same phantom; their noise differs in level and in draw.
    """
    images = np.stack([random_phantom(machine.mask.shape[0], seed) for seed in seeds])
    measured = [
        [
            acquire(image, machine.maps, machine.mask, snr, ECHOES * seed + echo)
            for echo, (image, snr) in enumerate(zip(pair, machine.snr))
        ]
        for seed, pair in zip(seeds, images)
    ]
    return {"kspace": np.array(measured), "image": images}
