"""Regression on a random network: as much fresh data as asked for, from nothing but a seed.

The task of Potapczynski et al., "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices",
NeurIPS 2024: inputs are normal, the target is the output of a deep ReLU network with random weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from structmat.data.corpus import content_hash
from structmat.data.errors import DataError

HELDOUT = 8192
"""Held-out points, the same for every seed of training."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network with `weights` float32 (in, out) of every layer; its output, less `mean` and over `std`, is the target."""

    weights: tuple[np.ndarray, ...]
    mean: float
    std: float
    sha256: str
    description: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 (n,): targets of x (n, inputs), of mean 0 and variance 1 over normal inputs."""
        return (_output(self.weights, x) - self.mean) / self.std


@lru_cache(maxsize=4)
def load(seed: int = 0, inputs: int = 8, width: int = 256, depth: int = 6) -> Teacher:
    """The network of a seed: `depth` layers, He initialisation, one output.

    Raises:
      DataError: a size below 1, or a seed out of range.
    """
    for name, value, least in (("inputs", inputs, 1), ("width", width, 1), ("depth", depth, 2), ("seed", seed, 0)):
        if value < least:
            raise DataError(f"a teacher's {name} must be at least {least}, got {value}")
    sizes = [inputs, *[width] * (depth - 1), 1]
    draw = _generator(seed, 0)
    weights = tuple(
        (draw.standard_normal((a, b)) * np.sqrt(2 / a)).astype(np.float32) for a, b in itertools.pairwise(sizes)
    )
    sample = _output(weights, _inputs(seed, 1, HELDOUT, inputs)).astype(np.float64)
    said = f"random ReLU network of {depth} layers of {width}, {inputs} inputs, seed {seed}"
    return Teacher(weights, float(sample.mean()), float(sample.std()), content_hash(*weights), said)


def teacher_batch(
    teacher: Teacher, seed: int, step: int, batch: int, rows: range | None = None
) -> dict[str, np.ndarray]:
    """`{"x": float32 (rows, inputs), "y": float32 (rows,)}`; no point is drawn twice."""
    x = _inputs(seed, 2 + step, batch, teacher.weights[0].shape[0])
    y = teacher(x)  # of the whole batch, as a product of fewer rows may round otherwise
    part = slice(None) if rows is None else slice(rows.start, rows.stop)
    return {"x": x[part], "y": y[part]}


def heldout_set(teacher: Teacher, data_seed: int) -> dict[str, np.ndarray]:
    """HELDOUT points in the form of a batch; those `load` took mean and variance of."""
    x = _inputs(data_seed, 1, HELDOUT, teacher.weights[0].shape[0])
    return {"x": x, "y": teacher(x)}


def _output(weights: tuple[np.ndarray, ...], x: np.ndarray) -> np.ndarray:
    for w in weights[:-1]:
        x = np.maximum(x @ w, 0)
    return (x @ weights[-1])[:, 0]


def _inputs(seed: int, stream: int, count: int, size: int) -> np.ndarray:
    return _generator(seed, stream).standard_normal((count, size), np.float32)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
