"""A checkpoint of arrays that are files: written in pieces, so that a model larger than memory can be saved.

Made for step 0 of a run whose weights come from elsewhere. What it writes is what `Checkpointer` restores: the same
folder, manifest and checksums; only the layout within Orbax's format differs (a folder per array, in pieces).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from structmat.training import manifest
from structmat.training.checkpoint import HASH_LIMIT, CheckpointError, nest
from structmat.training.checksum import finish, salted

PIECE = 32 << 20
"""Bytes of a piece on disk: several are in memory at once, compressed, while they are written."""
_WORDS = 1 << 22
"""Words whose checksum is taken at once."""


class Spool:
    """Arrays on disk under a folder, written whole or slice by slice; `close` removes them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._folder.mkdir(parents=True)
        self._held: dict[str, tuple[Path, tuple[int, ...], np.dtype[Any]] | np.ndarray] = {}

    def write(self, name: str, value: np.ndarray, slice_of: tuple[int, int] | None = None) -> None:
        """Write an array, or slice `i` of the `n` along a new first axis, given as (i, n).

        Raises:
          ValueError: another shape or dtype than the first slice had.
        """
        index, count = slice_of or (0, None)
        shape = value.shape if count is None else (count, *value.shape)
        if not math.prod(shape) or not shape:  # nothing a file could hold, or a scalar
            self._held[name] = np.zeros(shape, value.dtype) if not math.prod(shape) else value
            return
        if name not in self._held:
            file = self._folder / f"{len(self._held)}.bin"
            file.touch()
            with file.open("r+b") as opened:
                opened.truncate(math.prod(shape) * value.dtype.itemsize)
            self._held[name] = file, shape, value.dtype
        held = self._held[name]
        if not isinstance(held, tuple) or held[1:] != (shape, value.dtype):
            raise ValueError(f"{name}: {value.dtype} {shape} after {held[2]} {held[1]}")
        mapped = np.memmap(held[0], held[2], "r+", shape=held[1])
        mapped[() if count is None else index] = value

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything written, memory-mapped."""
        mapped = lambda held: np.memmap(held[0], held[2], "r", shape=held[1]) if isinstance(held, tuple) else held
        return {name: mapped(held) for name, held in self._held.items()}

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(workdir: str | Path, step: int, arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any]) -> None:
    """Write a step that `Checkpointer` restores.

    Args:
      arrays: slash path of the state -> numpy array, which may be memory-mapped, or broadcast from one value; pieces that
        are zero take no space.
      extra: JSON values, as in `Checkpointer.save`.

    Raises:
      CheckpointError: it could not be written.
    """
    folder = epath.Path(workdir).absolute() / "checkpoints"
    target = folder / f"{step}.saving"
    context = ocp.Context()
    context.memory_options.deepcopy_host_arrays = False
    context.array_options.saving.use_ocdbt = False  # which keeps all it writes in memory until the end
    context.array_options.saving.use_zarr3 = False  # whose files the loader does not recognise by themselves
    context.array_options.saving.storage_options.chunk_byte_size = PIECE
    described = {
        n: {"shape": list(x.shape), "dtype": x.dtype.name, "checksum": checksum_of(x)} for n, x in arrays.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with context, _quiet():
            ocp.save(target, nest({n: x for n, x in arrays.items() if x.size}), overwrite=True)
        manifest.write(target, step, described, _json_values(extra), HASH_LIMIT)
        target.rename(folder / str(step))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"step {step} was not saved in {folder}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that there is nothing to merge of the format it was told not to use."""
    expected = lambda record: "Skipping merge of OCDBT" not in record.getMessage()
    logging.getLogger("absl").addFilter(expected)
    try:
        yield
    finally:
        logging.getLogger("absl").removeFilter(expected)


def _json_values(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose tuples are lists, as they come back."""
    return json.loads(json.dumps(dict(extra), allow_nan=False))


def checksum_of(array: np.ndarray) -> str:
    """As `structmat.training.checksum` has it, of an array that need not fit the memory."""
    if 0 in array.strides and array.size and not np.any(array):  # zeros broadcast from one
        return _of_zeros(array.shape, array.dtype.name)
    total = np.zeros(2, np.uint32)
    flat = array.reshape(-1)
    parts = 2 if np.iscomplexobj(array) else 1
    for part in range(parts):
        per = _words_per_element(array.dtype)
        each = max(1, _WORDS // per)
        for start in range(0, flat.size, each):
            words = _words(flat[start : start + each], part)
            offset = (part * flat.size + start) * per
            total += np.asarray(_sums(jnp.asarray(words), jnp.uint32(offset % 2**32)))
    return finish([""], total[None])[""]


@functools.lru_cache(maxsize=256)
def _of_zeros(shape: tuple[int, ...], dtype: str) -> str:
    total, parts = np.zeros(2, np.uint32), 2 if dtype.startswith("complex") else 1
    count = math.prod(shape) * parts * _words_per_element(np.dtype(dtype))
    for start in range(0, count, _WORDS):
        words = jnp.zeros(min(_WORDS, count - start), jnp.uint32)
        total += np.asarray(_sums(words, jnp.uint32(start % 2**32)))
    return finish([""], total[None])[""]


def _words_per_element(dtype: np.dtype[Any]) -> int:
    real = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    return max(1, real // 4)


def _words(flat: np.ndarray, part: int) -> np.ndarray:
    """uint32 words of the elements, of the real (0) or imaginary (1) part where they are complex."""
    if flat.dtype.kind == "c":
        flat = flat.imag if part else flat.real
    flat = np.ascontiguousarray(flat)
    if flat.dtype == bool:
        return flat.astype(np.uint32)
    size = flat.dtype.itemsize
    return flat.view({1: np.uint8, 2: np.uint16}.get(size, np.uint32)).astype(np.uint32)


@jax.jit
def _sums(words: jax.Array, offset: jax.Array) -> jax.Array:
    position = offset + jnp.arange(words.size, dtype=jnp.uint32)
    return salted(words, position)
