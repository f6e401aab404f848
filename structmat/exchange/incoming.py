"""A run made of somebody else's weights: each matrix projected onto the structure of its site, one at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from structmat.exchange import from_disk
from structmat.exchange.huggingface import KEPT
from structmat.exchange.sources import Source
from structmat.exchange.structured import COLLECTIONS, empty_folder
from structmat.nn import Site, leaf_groups
from structmat.nn.sites import layer_paths
from structmat.parallel import make_mesh, on_mesh
from structmat.structures import Bound, StructureError, flatten_leaves
from structmat.structures.stacks import solve
from structmat.surgery.layers import named
from structmat.training import workdir
from structmat.training.build import optimizer_for
from structmat.training.config import identity, validate
from structmat.training.environment import versions
from structmat.training.errors import ConfigError
from structmat.training.methods import hook, rule_for
from structmat.training.state import plan_state
from structmat.training.task import Task, dump_table


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one site.

    Attributes:
      path: of its layer. kind, shape: of the site. structure: canonical text. short: for people.
      error: |W - W'| / |W| in Frobenius norm, W theirs in f32 and W' ours; 0 where W is zero and W' too.
      squared: (|W - W'|^2, |W|^2), to sum over sites.
      params, dense_params: stored real numbers.
      bits: stored, f32 and int32.
      seconds: of reading, projecting and writing, compilation included.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    structure: str
    short: str
    error: float
    squared: tuple[float, float]
    params: int
    dense_params: int
    bits: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Incoming:
    """What `bring_in` did: a row for every site, the run's task, SHA-256 of all that was read, seconds."""

    rows: tuple[Row, ...]
    task: Task
    weights_sha256: str
    seconds: float


def run_config(source: Source, base: ConfigDict, rules: str = "", context: int | None = None) -> ConfigDict:
    """The config of the run: the model is the source's, how to train it is `base`'s.

    Args:
      base: of the lm task, whatever its model; its dropout, scan, remat and dtype are kept too.
      rules: as `config.structure`; sites that they do not match keep the source's structures.
      context: shorter than the source's, for less memory; a model of rotary or learned positions is the same there.

    Raises:
      ConfigError: another task, both rules and a structure in `base`, or a context the source does not reach.
    """
    if base.task != "lm":
        raise ConfigError("task", base.task, "these weights are of a language model", "'lm' is")
    if rules and base.structure != "dense()":
        raise ConfigError("structure", base.structure, f"and --rules={rules!r} are both there", "one of them is enough")
    if context is not None and not 1 <= context <= source.fields["context"]:
        raise ConfigError("model.context", context, f"must be within the source's 1 .. {source.fields['context']}")
    config = ConfigDict(base.to_dict())
    kept = {k: base.model[k] for k in ("dropout", "scan", "remat", "dtype")}
    fields = {**source.fields, **({} if context is None else {"context": context})}
    config.model = ConfigDict({"name": source.model, **fields, **kept})
    try:
        config.structure = source.rules(rules or (base.structure if base.structure != "dense()" else ""))
    except StructureError as error:
        raise ConfigError("structure", rules or base.structure, str(error)) from None
    return config


def bring_in(
    source: Source, config: ConfigDict, folder: str | Path, on_row: Callable[[Row, int], None] | None = None
) -> Incoming:
    """Make `folder` a run at step 0 with the source's weights in the structures of the config.

    Reads, projects and writes one matrix at a time: in memory are a matrix, its parameters and the workspace of the
    projection, whatever the size of the model. The optimiser's state is that of a new run.

    Args:
      config: from `run_config`.
      on_row: called with every row and the number of sites.

    Raises:
      ConfigError, DataError, StructureError: what is wrong, before anything is written where that can be known before.
    """
    began = time.perf_counter()
    task = validate(config, 1)
    table = task.table
    _refuse_unprojectable(table, source)
    if hook(config, "link", table) is not None:
        rule = "keeps optimiser state of its own, which a run made of other weights has not"
        raise ConfigError("method", config.method, rule, "'' is")
    data_hash = task.load().sha256
    mesh = make_mesh(dict(replica=1, data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
    with on_mesh(mesh):
        template = plan_state(task, optimizer_for(config, task)[0], rule_for(config, table), mesh)
    folder = empty_folder(folder)
    try:
        with from_disk.Spool(folder / ".arriving") as spool:
            digest = hashlib.sha256()
            rows = _sites(source, task, config.seed, spool, digest, on_row)
            _others(source, template, spool, digest)
            source.refuse_left()
            arrays = _state(template, spool.arrays())
            extra = {
                "config": _json(config),
                "sites": dump_table(table),
                "switches": [],
                "method_report": {},
                "data_hash": data_hash,
                "versions": versions(),
                "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
                "seconds": 0.0,
            }
            from_disk.save(folder, 0, arrays, extra)
        if source.kept:
            (folder / KEPT).mkdir()
            for file in source.kept:
                shutil.copyfile(file, folder / KEPT / file.name)
        workdir.occupy(folder, identity(config))  # last: with it the folder is a run
    except BaseException:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        raise
    return Incoming(tuple(rows), task, digest.hexdigest(), time.perf_counter() - began)


def _json(config: ConfigDict) -> Mapping[str, Any]:
    return json.loads(config.to_json())


def _refuse_unprojectable(table: Mapping[str, Site], source: Source) -> None:
    """Before any weight is read: what is no matrix, or has no projection."""
    tried: dict[Bound, str] = {}
    for path, site in table.items():
        if site.bound in tried or source.holds(path, site):
            continue
        tried[site.bound] = path
        w = jax.ShapeDtypeStruct((site.bound.d_in, site.bound.d_out), jnp.float32)
        try:
            if not site.bound.is_linear:
                raise StructureError(
                    f"{site.bound.structure.short()} is no matrix, so nothing can be projected onto it"
                )
            jax.eval_shape(lambda w, key, bound=site.bound: bound.project(w, key=key), w, jax.random.key(0))
        except StructureError as error:
            raise StructureError(f"site {path}: {error}") from None


def _sites(
    source: Source,
    task: Task,
    seed: int,
    spool: from_disk.Spool,
    digest: Any,
    on_row: Callable[[Row, int], None] | None,
) -> list[Row]:
    """Every site written to the spool, those of one stored array after one another."""
    table, rows, key = task.table, [], jax.random.key(seed)
    numbers = {path: i for i, path in enumerate(table)}
    for place, _ in leaf_groups(table).items():
        layers = layer_paths("/".join(place))
        for i, path in enumerate(layers):
            slice_of = None if layers == ["/".join(place)] else (i, len(layers))
            params, row = _converted(source, path, table[path], jax.random.fold_in(key, numbers[path]), digest)
            for name, leaf in flatten_leaves(table[path].bound.leaves()):
                collection = "params" if leaf.trainable else "frozen"
                spool.write("/".join((collection, *place, name)), params.pop(name), slice_of)
            rows.append(row)
            if on_row is not None:
                on_row(row, len(table))
    return sorted(rows, key=lambda row: numbers[row.path])


def _converted(source: Source, path: str, site: Site, key: jax.Array, digest: Any) -> tuple[dict[str, np.ndarray], Row]:
    """The leaves of a site by slash path, and what they miss."""
    began, bound = time.perf_counter(), site.bound
    squared = (0.0, 0.0)
    if not source.holds(path, site):
        w = np.ascontiguousarray(source.matrix(path, site))
        _note(digest, path, w)
        own, missed = ({"kernel": w}, 0.0) if bound.structure.name == "dense" else _projected(path, bound, w, key)
        squared = missed, float(np.vdot(w, w))
    else:
        own = source.leaves(path, site)
        for name, leaf in own.items():
            _note(digest, f"{path}/{name}", leaf)
    off, size = squared
    return own, Row(
        path=path,
        kind=site.kind,
        shape=(bound.d_in, bound.d_out),
        structure=str(bound.structure),
        short=bound.structure.short(),
        error=(off / size) ** 0.5 if size else off**0.5,
        squared=squared,
        params=bound.params,
        dense_params=bound.dense_params,
        bits=bound.cost(1).bits,
        seconds=time.perf_counter() - began,
    )


def _projected(path: str, bound: Bound, w: np.ndarray, key: jax.Array) -> tuple[dict[str, np.ndarray], float]:
    """The nearest leaves by slash path, and |w - M|^2."""
    w = jnp.asarray(w)
    try:
        params = solve(bound, w, key=key)
    except StructureError as error:
        raise StructureError(f"site {path}: {error}") from None
    return {name: np.asarray(leaf) for name, leaf in named(params).items()}, float(_missed(bound, w, params))


@functools.partial(jax.jit, static_argnums=0)
def _missed(bound: Bound, w: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """|w - M|^2."""
    with jax.default_matmul_precision("highest"):
        return jnp.sum(jnp.square(jnp.abs(w - bound.materialize(params))))


def _others(source: Source, template: Any, spool: from_disk.Spool, digest: Any) -> None:
    """Biases, norms and positions: what the variables have beside the leaves of sites."""
    for collection in COLLECTIONS:
        for name, leaf in named(getattr(template, collection)).items():
            full = f"{collection}/{name}"
            if full in spool:
                continue
            layers = layer_paths(name)
            for i, path in enumerate(layers):
                stacked = layers != [name]
                value = source.array(path, leaf.shape[1:] if stacked else leaf.shape)
                value = np.ascontiguousarray(value).astype(leaf.dtype).reshape(value.shape)
                _note(digest, path, value)
                spool.write(full, value, (i, len(layers)) if stacked else None)


def _state(template: Any, written: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every leaf of the training state: what was written, and zeros, which is how clock and optimiser begin."""
    arrays = {}
    for name, leaf in named(template).items():
        if name.partition("/")[0] in COLLECTIONS:
            arrays[name] = written[name]
            if (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"{name}: {arrays[name].dtype} {arrays[name].shape} for {leaf.dtype} {leaf.shape}")
        else:
            arrays[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return arrays


def _note(digest: Any, name: str, value: np.ndarray) -> None:
    digest.update(f"{name} {value.dtype} {value.shape}".encode())
    digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
