"""Solutions, solved for once and kept on disk.

A set lies in one file named by a hash of its spec, with a checksum that every load verifies. While it is being made, each
batch lies in a file of its own, so that a run cut short goes on where it was; files appear whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track

from structmat.data.corpus import content_hash
from structmat.data.errors import DataError
from structmat.data.pde.coarse import strided, truncated
from structmat.data.pde.spec import Spec

CACHE = "STRUCTMAT_CACHE"
"""The environment variable that names the folder of generated data."""

BATCH = 64
"""Samples solved for at once."""

Solver = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, eq=False)
class FieldSet:
    """Inputs (samples, *grid) and outputs (samples, snapshots, *grid) of one dtype; `times` float64 (snapshots,).

    Points are i / n on the torus (`periodic`), else i / (n - 1) with the edges; `sha256` covers inputs and outputs.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    times: np.ndarray
    dimensions: int
    periodic: bool
    sha256: str
    description: str

    @property
    def resolution(self) -> int:
        """Points a side."""
        return self.inputs.shape[-1]

    def at(self, resolution: int, how: str = "strided") -> FieldSet:
        """The same solutions on a coarser grid: `strided` takes points, `spectral` cuts Fourier modes.

        Raises:
          DataError: `how` is neither, the points are not a part of these, or modes were asked of a field with edges.
        """
        if how not in ("strided", "spectral") or (how == "spectral" and not self.periodic):
            valid = "'strided' or 'spectral'" if self.periodic else "'strided', as the field is not periodic"
            raise DataError(f"{self.description}: no {how!r} grids; valid is {valid}")
        if how == "strided":
            coarse = lambda a: strided(a, resolution, self.dimensions, self.periodic)
        else:
            coarse = lambda a: truncated(a, resolution, self.dimensions)
        inputs, outputs = coarse(self.inputs), coarse(self.outputs)
        said = f"{self.description}, {how} to {resolution}"
        return replace(self, inputs=inputs, outputs=outputs, sha256=content_hash(inputs, outputs), description=said)


def cache_folder() -> Path:
    """Where generated data lies: $STRUCTMAT_CACHE, or structmat in the user's cache folder."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "structmat"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "structmat"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structmat"


def load(spec: Spec, folder: str | Path | None = None, batch: int = BATCH) -> FieldSet:
    """The solutions of a spec, from disk or else solved for and put there.

    Batches are split over the devices of this process; every process of several finds or makes the set for itself.

    Args:
      folder: `cache_folder() / "pde"` if None.
      batch: samples at once; bounds the memory, and is the unit in which an interrupted run resumes. Not part of the spec.

    Raises:
      DataError: the file is damaged, or a solution is not finite (a step too large for the flow); names it.
    """
    if batch < 1:
        raise DataError(f"a batch holds at least 1 sample, got {batch}")
    path = (cache_folder() / "pde" if folder is None else Path(folder)) / f"{spec.name}.npz"
    if path.is_file():
        try:
            inputs, outputs, digest = _read(path, spec)
        except DataError as error:
            raise DataError(f"{error}; delete it, and it is made again") from error
    else:
        inputs, outputs, digest = _generate(spec, path, batch)
    side = "x".join([str(spec.resolution)] * spec.dimensions)
    said = f"{spec.describe()}: {spec.samples} samples at {side}, solved at {spec.solved}, seed {spec.seed}"
    return FieldSet(inputs, outputs, spec.times, spec.dimensions, spec.periodic, digest, said)


def _generate(spec: Spec, path: Path, batch: int) -> tuple[np.ndarray, np.ndarray, str]:
    parts = path.with_suffix(".parts")
    ranges = [range(i, min(i + batch, spec.samples)) for i in range(0, spec.samples, batch)]
    solver, made = _solver(spec, min(batch, spec.samples)), []
    for rows in _shown(ranges, f"solving for {spec.name}"):
        part = parts / f"{rows.start}-{rows.stop}.npz"
        arrays = _found(part, spec)
        if arrays is None:
            arrays = _solve(spec, solver, rows)
            _write(part, spec, *arrays)
        made.append(arrays)
    inputs, outputs = (np.concatenate(arrays) for arrays in zip(*made))
    digest = _write(path, spec, inputs, outputs)
    shutil.rmtree(parts, ignore_errors=True)
    return inputs, outputs, digest


@lru_cache(maxsize=4)
def _solver(spec: Spec, batch: int) -> Solver:
    """Compiles once for all batches: indices int32 (batch, rounded up to the devices,) -> inputs, outputs as kept."""
    devices = jax.local_devices()[:batch]
    mesh = Mesh(np.array(devices), ("samples",))

    def sample(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        fields = spec.sample(jax.random.fold_in(jax.random.key(spec.seed, impl="threefry2x32"), index))
        return tuple(strided(a, spec.resolution, spec.dimensions, spec.periodic) for a in fields)

    rows = P("samples")
    compiled = jax.jit(jax.shard_map(jax.vmap(sample), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    size = -(-batch // len(devices)) * len(devices)
    return lambda index: compiled(jnp.pad(index, (0, size - len(index)), "edge"))


def _solve(spec: Spec, solver: Solver, rows: range) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(spec.dtype == "float64"):
        inputs, outputs = (
            np.asarray(a)[: len(rows)] for a in solver(jnp.arange(rows.start, rows.stop, dtype=jnp.int32))
        )
    finite = np.isfinite(outputs.reshape(len(rows), -1)).all(axis=1)
    if not finite.all():
        first = rows.start + int(np.argmin(finite))
        raise DataError(f"{spec.name}: sample {first} is not finite; a smaller dt is needed than in {spec.text}")
    return inputs, outputs


def _found(part: Path, spec: Spec) -> tuple[np.ndarray, np.ndarray] | None:
    if not part.is_file():
        return None
    try:
        return _read(part, spec)[:2]
    except DataError as error:
        warnings.warn(f"{error}; it is solved for again", stacklevel=4)
        return None


def _write(path: Path, spec: Spec, inputs: np.ndarray, outputs: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, beside = content_hash(inputs, outputs), path.with_suffix(f".{os.getpid()}")
    with beside.open("wb") as file:
        np.savez(file, inputs=inputs, outputs=outputs, sha256=digest, spec=spec.text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return digest


def _read(path: Path, spec: Spec) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            inputs, outputs, digest, text = (file[name] for name in ("inputs", "outputs", "sha256", "spec"))
    except Exception as error:  # zipfile and numpy raise nearly anything on damage
        raise DataError(f"{str(path)!r} is damaged ({error!r})") from error
    if content_hash(inputs, outputs) != str(digest) or str(text) != spec.text:
        raise DataError(f"{str(path)!r} is damaged: its content is not that of its checksum and spec {spec.text}")
    return inputs, outputs, str(digest)


def _shown(ranges: list[range], label: str) -> Iterable[range]:
    """The ranges, with a bar on a terminal and otherwise a line every 10 seconds, on stderr."""
    if sys.stderr.isatty():
        return track(ranges, label, console=Console(stderr=True), transient=True)
    return _told(ranges, label)


def _told(ranges: list[range], label: str) -> Iterator[range]:
    shown = time.perf_counter()
    for rows in ranges:
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{label}: {rows.start}/{ranges[-1].stop} samples", file=sys.stderr, flush=True)
        yield rows
