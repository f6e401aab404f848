"""Scans to train on and to hold out, made from seeds: every phantom another, all from one scanner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from structmat.data.batches import shuffled_indices
from structmat.data.corpus import content_hash
from structmat.data.errors import DataError
from structmat.data.mri.acquisition import Scanner, acquire, scanner, scans
from structmat.data.mri.phantoms import ECHOES

VERSION = 1
"""Goes up when the same arguments give other scans."""
MOST = 2**16
"""Scans a part may have: phantoms are numbered 2 MOST seed + i to train on, and MOST more to hold out."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """`train` and `test` as `acquisition.scans` gives them, and the scanner they share."""

    machine: Scanner
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    sha256: str
    description: str


@lru_cache(maxsize=2)
def load(
    size: int, coils: int, acceleration: float, pattern: str, snr: tuple[float, ...], train: int, test: int, seed: int
) -> Dataset:
    """Scans of images of side `size`; coils, mask, phantoms and noise all follow `seed`, and fewer are the first of more.

    Raises:
      DataError: what `acquisition.scanner` refuses, or train or test not in 1 .. MOST.
    """
    for name, count in (("train", train), ("test", test)):
        if not 1 <= count <= MOST:
            raise DataError(f"{name} is {count}; valid: 1 .. {MOST}")
    machine = scanner(size, coils, acceleration, pattern, snr, seed)
    first = 2 * MOST * seed
    parts = scans(machine, range(first, first + train)), scans(machine, range(first + MOST, first + MOST + test))
    digest = content_hash(machine.maps, machine.mask, *(part[name] for part in parts for name in ("kspace", "image")))
    levels = " and ".join(f"{level:g}" for level in snr)
    said = (
        f"{train} train, {test} test phantoms of side {size}, {coils} coils, {pattern} at acceleration {acceleration:g}, "
        f"SNR {levels} dB, seed {seed}"
    )
    return Dataset(machine, *parts, digest, said)


def scan_batch(
    data: Dataset, seed: int, step: int, batch: int, fresh_noise: bool = False, rows: range | None = None
) -> dict[str, np.ndarray]:
    """Training scans as `with_scanner` gives them, every one once per epoch.

    fresh_noise: measure each again with noise that (seed, step, row) decide; else its noise is always the same.
    """
    index = shuffled_indices(len(data.train["image"]), seed, step, batch, rows)
    image, kspace = data.train["image"][index], data.train["kspace"][index]
    if fresh_noise:
        machine = data.machine
        kspace = np.array(
            [
                [
                    acquire(
                        pair[echo], machine.maps, machine.mask, machine.snr[echo], _noise_seed(seed, step, row, echo)
                    )
                    for echo in range(ECHOES)
                ]
                for row, pair in zip(range(batch) if rows is None else rows, image)
            ]
        )
    return with_scanner(data.machine, kspace, image)


def heldout_batches(data: Dataset, batch: int, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Held-out scans in order, at most `limit` batches, the last filled up with scans that are all zeros."""
    image, kspace = data.test["image"], data.test["kspace"]
    for number, start in enumerate(range(0, len(image), batch)):
        if number == limit:
            return
        part = slice(start, start + batch)
        short = batch - len(image[part])
        filled = lambda a: np.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1)))  # noqa: B023
        yield with_scanner(data.machine, filled(kspace[part]), filled(image[part]))


def with_scanner(machine: Scanner, kspace: np.ndarray, image: np.ndarray) -> dict[str, np.ndarray]:
    """`{"kspace": complex64 (n, ECHOES, coils, h, w), "maps": complex64 (n, coils, h, w), "mask": bool (n, h, w), "image":
    float32 (n, ECHOES, h, w)}`: what a reconstruction gets, and what it should be."""
    share = lambda a: np.broadcast_to(a, (len(image), *a.shape))
    return {"kspace": kspace, "maps": share(machine.maps), "mask": share(machine.mask), "image": image}


def _noise_seed(seed: int, step: int, row: int, echo: int) -> int:
    return int(np.random.SeedSequence((seed, step, row, echo)).generate_state(1, np.uint64)[0])
