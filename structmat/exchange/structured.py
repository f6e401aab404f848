"""Any structured model as one safetensors file and one JSON: arrays by layer, the site table, the config, checksums.

`weights.safetensors` holds every array under the slash path of its single layer, `layers_7/mlp/up/R`, whatever groups of
layers the model scans; of a complex one the last axis, of size 2, is real and imaginary part. `structmat.json` says what
they are: collection, shape, dtype and SHA-256 of each, structures in canonical text, and versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.data.errors import DataError
from structmat.exchange.tensor_files import Tensor, TensorWriter, tensors_in
from structmat.nn import Site
from structmat.nn.sites import layer_paths
from structmat.surgery import by_layer
from structmat.surgery.layers import named
from structmat.training.environment import versions
from structmat.training.plain_json import plain
from structmat.training.task import BATCH_STATS, dump_table

INDEX, WEIGHTS = "structmat.json", "weights.safetensors"
SCHEMA = 1
COLLECTIONS = ("params", "frozen", BATCH_STATS)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Structured:
    """What such a folder holds, still on disk.

    Attributes:
      arrays: layer path -> {collection, shape, dtype, sha256}. sites: layer path -> {structure, kind, in_shape, out_shape}.
      config: of the run, or {}. versions: of what wrote it.
    """

    folder: Path
    arrays: Mapping[str, Mapping[str, Any]]
    sites: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """One array, in its own dtype.

        Raises:
          DataError: there is none of the name, or its bytes are not those that were written.
        """
        if name not in self.arrays:
            raise DataError(f"{str(self.folder)!r} has no array {name!r}")
        stored, about = self.tensors[name].read(), self.arrays[name]
        if _sha256(stored) != about["sha256"]:
            raise DataError(f"{self.folder / WEIGHTS}: array {name!r} differs from its SHA-256; copy the file again")
        return stored if about["dtype"] == stored.dtype.name else _as_complex(stored, about["dtype"])


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_safetensors` returns: variables {"params", "frozen"} and, if any, "batch_stats", the stored sites, config ({}
    if none) and versions."""

    variables: dict[str, Any]
    sites: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    versions: Mapping[str, str]


def save_safetensors(
    folder: str | Path, variables: Mapping[str, Any], table: Mapping[str, Site], config: Mapping[str, Any] | None = None
) -> None:
    """Write the model's variables to a new or empty folder; every leaf dtype of a structure, bfloat16 too, bit by bit.

    Args:
      variables: collections `params`, `frozen` and `batch_stats`, unboxed; groups of scanned layers are taken apart.
      table: the model's sites, from `structmat.nn.sites`.
      config: JSON of the run, so that a model can be built without its code.

    Raises:
      DataError: the folder is not empty, or a collection or dtype that cannot be saved.
    """
    if unknown := [name for name in variables if name not in COLLECTIONS and jax.tree.leaves(variables[name])]:
        raise DataError(f"the collection {unknown[0]!r} cannot be saved; valid: {', '.join(COLLECTIONS)}")
    tree = {name: variables[name] for name in COLLECTIONS if name in variables}
    arrays, pieces = {}, by_layer(tree)
    for path, (array, index) in pieces.items():
        collection, _, name = path.partition("/")
        shape = array.shape if index is None else array.shape[1:]
        arrays[name] = {"collection": collection, "shape": list(shape), "dtype": jnp.dtype(array.dtype).name}

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for path, (array, index) in pieces.items():
            yield path.partition("/")[2], np.asarray(array if index is None else array[index])

    write_folder(folder, arrays, values(), dump_table(table), config or {})


def write_folder(
    folder: str | Path,
    arrays: Mapping[str, Mapping[str, Any]],
    values: Iterable[tuple[str, np.ndarray]],
    sites: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> None:
    """Write the two files, one array after the other; the JSON comes last, without it there is nothing to load.

    Args:
      arrays: layer path -> {collection, shape, dtype}. values: every one of them once, in any order.

    Raises:
      DataError: as `save_safetensors`.
    """
    folder = empty_folder(folder)
    stored = {name: _stored(a["shape"], a["dtype"]) for name, a in arrays.items()}
    writer = TensorWriter(folder / WEIGHTS, stored, {"format": "np"})
    sums = {}
    for name, value in values:
        value = _as_real(value)
        writer.write(name, value)
        sums[name] = _sha256(value)
    writer.finish()
    about = {name: {**arrays[name], "sha256": sums[name]} for name in arrays}
    body = {"schema": SCHEMA, "versions": versions(), "config": plain(config, "config"), "sites": plain(sites, "sites")}
    (folder / INDEX).write_text(json.dumps(body | {"arrays": about}, indent=1) + "\n")


def empty_folder(folder: str | Path) -> Path:
    """The folder, made; raises DataError where it holds something or is a file."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{str(folder)!r} is a file; give a new or empty folder")
    if folder.exists() and any(folder.iterdir()):
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:4])
        raise DataError(f"{str(folder)!r} is not empty (it holds {names}); give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_folder(folder: str | Path) -> Structured:
    """What a folder holds; reads the JSON and the header.

    Raises:
      DataError: no such folder; or its two files do not agree, with every array that is missing, extra or of another
        shape or dtype.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{str(folder)!r} has no {INDEX}; give a folder that save_safetensors wrote")
    try:
        body = json.loads(path.read_text())
        schema, arrays, sites = body["schema"], body["arrays"], body["sites"]
        wanted = {name: _stored(a["shape"], a["dtype"]) for name, a in arrays.items()}
        config, stored = body["config"], body["versions"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not readable ({error!r})") from None
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema}; this version reads {SCHEMA}")
    tensors = tensors_in(folder / WEIGHTS)
    _compare(
        f"{folder / WEIGHTS} is not what {INDEX} says", wanted, {n: (t.shape, t.dtype) for n, t in tensors.items()}
    )
    return Structured(folder, arrays, sites, config, stored, tensors)


def load_safetensors(folder: str | Path, like: Any = None) -> Loaded:
    """The variables that `save_safetensors` wrote, with the same bits.

    Args:
      like: the variables' tree, arrays or ShapeDtypeStructs, to be filled, in whatever groups it scans its layers, such
        as `nn.unbox(jax.eval_shape(model.init, key, x))`. Without it layers come singly, as a model with `scan=False`
        has them.

    Raises:
      DataError: as `open_folder`; a checksum that differs; or `like` wants other arrays, each one named.
    """
    held = open_folder(folder)
    stored = {f"{a['collection']}/{n}": (tuple(a["shape"]), a["dtype"]) for n, a in held.arrays.items()}
    read = lambda path: held.read(path.partition("/")[2])
    if like is None:
        tree: dict[str, Any] = {}
        for path in stored:
            *parents, last = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jnp.asarray(read(path))
        return Loaded({"params": {}, "frozen": {}} | tree, held.sites, held.config, held.versions)
    leaves = named(like)
    wanted = {}
    for path, leaf in leaves.items():
        layers = layer_paths(path)
        shape = tuple(leaf.shape) if layers == [path] else tuple(leaf.shape[1:])
        wanted |= dict.fromkeys(layers, (shape, jnp.dtype(leaf.dtype).name))
    _compare(f"{str(held.folder)!r} does not hold this model", wanted, stored)
    found = []
    for path in leaves:
        layers = layer_paths(path)
        found.append(jnp.asarray(read(path) if layers == [path] else np.stack([read(layer) for layer in layers])))
    tree = jax.tree.unflatten(jax.tree.structure(like), found)
    return Loaded({"params": {}, "frozen": {}} | dict(tree), held.sites, held.config, held.versions)


def _compare(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    shown = lambda about: f"{about[1]} {tuple(about[0])}"
    rows = [f"  missing: {n} {shown(a)}" for n, a in wanted.items() if n not in found]
    rows += [f"  extra: {n} {shown(a)}" for n, a in found.items() if n not in wanted]
    both = [
        n for n in wanted if n in found and (tuple(wanted[n][0]), wanted[n][1]) != (tuple(found[n][0]), found[n][1])
    ]
    rows += [f"  other: {n} is {shown(found[n])}, not {shown(wanted[n])}" for n in both]
    if rows:
        more = [f"  ... and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
        raise DataError("\n".join([f"{what}:", *rows[:_SHOWN], *more]))


def _stored(shape: Iterable[int], dtype: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype in the file."""
    real = {"complex64": "float32", "complex128": "float64"}.get(dtype)
    return (*shape, *((2,) if real else ())), real or dtype


def _as_real(value: np.ndarray) -> np.ndarray:
    return np.stack([value.real, value.imag], -1) if np.iscomplexobj(value) else value


def _as_complex(stored: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(stored).view(dtype)[..., 0]


def _sha256(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).view(np.uint8).data).hexdigest()
