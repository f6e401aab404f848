"""A run's weights written for others: dense in Hugging Face's names, or as they are in a safetensors file of our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from structmat.exchange import structured
from structmat.exchange.huggingface import BESIDE, CONFIG, FAMILIES, KEPT, Family, Place, read_config
from structmat.exchange.structured import empty_folder
from structmat.exchange.tensor_files import TensorWriter
from structmat.nn import Site, leaf_groups
from structmat.nn.sites import layer_paths
from structmat.structures import StructureError, flatten_leaves, parse
from structmat.training import manifest
from structmat.training.checkpoint import Checkpointer
from structmat.training.errors import RunError
from structmat.training.load import StoredWeights, stored_weights
from structmat.training.plain_json import plain
from structmat.training.task import dump_table

TENSORS = "model.safetensors"
FLOATS = ("float32", "bfloat16", "float16")


def export_huggingface(run: str | Path, out: str | Path, dtype: str = "float32") -> dict[str, Any]:
    """Write a GPT or LLaMA run as a folder that transformers' `from_pretrained` reads: every weight dense.

    One stored array of the checkpoint is in memory at a time. What came with the weights (tokenizer, further fields of their
    config) goes along.

    Args:
      dtype: of the tensors, one of `FLOATS`.

    Returns:
      The config.json written.

    Raises:
      RunError: no run, another task, or `dtype`. StructureError: a site that is no matrix. DataError: `out` is not empty.
    """
    if dtype not in FLOATS:
        raise RunError(f"dtype {dtype!r}; valid: {', '.join(FLOATS)}")
    weights = stored_weights(run, ".*")
    _refuse_nonlinear(weights.table)
    family, config = _theirs(Path(run), weights, dtype)
    model = weights.config.model.to_dict()
    places = family.places(model)
    shapes = _shapes(Path(run), weights)
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for path, place in places.items():
        shape = shapes[path][::-1] if place.transposed else shapes[path]
        tensors[place.tensor] = (*shape[:-1], shape[-1] * place.parts), dtype
    out = empty_folder(out)
    writer = TensorWriter(out / TENSORS, tensors, {"format": "pt"})

    def write(place: Place, value: np.ndarray) -> None:
        value = value.T if place.transposed else value
        size = tensors[place.tensor][0][-1]
        part = (..., place.columns(size)) if place.parts > 1 else ()
        writer.write(place.tensor, value, *part)

    for path, read in weights.readers.items():
        write(places[path], np.asarray(read()))
    for path, value in _others(Path(run), weights, _beside(Path(run), weights)):
        factor = _head_scale(weights) if path in ("norm/scale", "norm/bias") else 1.0
        write(places[path], (value * np.float32(factor)).reshape(shapes[path]))
    writer.finish()
    for name in BESIDE:
        if (kept := Path(run) / KEPT / name).is_file():
            shutil.copyfile(kept, out / name)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return config


def save_run(run: str | Path, out: str | Path, densify: bool = False) -> Mapping[str, Site]:
    """Write a run's newest checkpoint as `save_safetensors` does, one stored array in memory at a time.

    Args:
      densify: every weight as its dense matrix, and the structures `dense()`.

    Returns:
      The sites of the run.

    Raises:
      RunError: no run. StructureError: `densify` at a site that is no matrix. DataError: `out` is not empty.
    """
    weights = stored_weights(run, ".*")
    table, config = weights.table, plain(json.loads(weights.config.to_json()), "config")
    sites = dump_table(table)
    stored = _stored(Path(run), weights.step)
    beside = _beside(Path(run), weights)
    arrays: dict[str, dict[str, Any]] = {}
    if densify:
        _refuse_nonlinear(table)
        config["structure"] = "dense()"
        for path, site in table.items():
            sites[path]["structure"] = str(parse("dense()"))
            shape = [site.bound.d_in, site.bound.d_out]
            arrays[f"{path}/kernel"] = {"collection": "params", "shape": shape, "dtype": "float32"}
    names = beside if densify else [n for n in stored if n.partition("/")[0] in structured.COLLECTIONS]
    for name in names:
        collection, _, path = name.partition("/")
        layers = layer_paths(path)
        shape = stored[name]["shape"][0 if layers == [path] else 1 :]
        about = {"collection": collection, "shape": list(shape), "dtype": stored[name]["dtype"]}
        arrays |= {layer: dict(about) for layer in layers}

    def values() -> Iterator[tuple[str, np.ndarray]]:
        if densify:
            for path, read in weights.readers.items():
                yield f"{path}/kernel", np.asarray(read(), np.float32)
        yield from _others(Path(run), weights, names)

    structured.write_folder(out, arrays, values(), sites, config)
    for name in (CONFIG, *BESIDE):
        if (kept := Path(run) / KEPT / name).is_file():
            shutil.copyfile(kept, Path(out) / name)
    return table


def _theirs(run: Path, weights: StoredWeights, dtype: str) -> tuple[Family, dict[str, Any]]:
    """Their family and config: what they had beside, and what the model is now."""
    config = weights.config
    models = {family.model: kind for kind, family in reversed(FAMILIES.items())}
    if config.task != "lm" or config.model.name not in models:
        what = f"task {config.task!r}" + (f", model {config.model.name!r}" if "model" in config else "")
        raise RunError(
            f"{str(run)!r} is of {what}; Hugging Face has a form for {', '.join(models)} of the lm task only"
        )
    kind, held = models[config.model.name], {}
    if (run / KEPT / CONFIG).is_file():
        held = read_config(run / KEPT)
        kind = held["model_type"]
    family = FAMILIES[kind]
    for old in ("torch_dtype", "rope_scaling", "_name_or_path"):
        held.pop(old, None)
    own = {"model_type": kind, "architectures": [family.architecture], "dtype": dtype}
    held = {"use_cache": True, "bos_token_id": None, "eos_token_id": None} | held
    return family, held | family.theirs(config.model.to_dict()) | own


def _refuse_nonlinear(table: Mapping[str, Site]) -> None:
    for path, site in table.items():
        if not site.bound.is_linear:
            raise StructureError(
                f"site {path}: {site.bound.structure.short()} is no matrix, so it has no dense form; without --densify "
                "--to=safetensors keeps it as it is"
            )


def _shapes(run: Path, weights: StoredWeights) -> dict[str, tuple[int, ...]]:
    """Shape of everything a Place speaks of, by our path: weights as (d_in, d_out), biases flat."""
    shapes = {path: (site.bound.d_in, site.bound.d_out) for path, site in weights.table.items()}
    stored = _stored(run, weights.step)
    for name in _beside(run, weights):
        path = name.partition("/")[2]
        layers = layer_paths(path)
        shape = tuple(stored[name]["shape"][0 if layers == [path] else 1 :])
        flat = (int(np.prod(shape)),) if path.endswith("/bias") else shape
        shapes |= dict.fromkeys(layers, flat)
    return shapes


def _stored(run: Path, step: int) -> Mapping[str, Mapping[str, Any]]:
    """Slash path -> {shape, dtype} of every array of the checkpoint."""
    with Checkpointer(str(run)) as checkpoints:
        return manifest.read(checkpoints.folder / str(step)).arrays


def _beside(run: Path, weights: StoredWeights) -> list[str]:
    """Names of the variables that are no leaves of sites: biases, norms, positions."""
    leaves = set()
    for place, (_, site) in leaf_groups(weights.table).items():
        for name, leaf in flatten_leaves(site.bound.leaves()):
            leaves.add("/".join(("params" if leaf.trainable else "frozen", *place, name)))
    stored = _stored(run, weights.step)
    return [n for n in stored if n.partition("/")[0] in structured.COLLECTIONS and n not in leaves]


def _others(run: Path, weights: StoredWeights, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(layer path, array) of stored arrays, each read once."""
    with Checkpointer(str(run)) as checkpoints:
        for name in names:
            whole = checkpoints.read(weights.step, [name])[name]
            path = name.partition("/")[2]
            layers = layer_paths(path)
            for i, layer in enumerate(layers):
                yield layer, np.asarray(whole if layers == [path] else whole[i])


def _head_scale(weights: StoredWeights) -> float:
    """What the last norm is multiplied by, so that their tied head, which has no factor, gives our logits."""
    model = weights.config.model
    if not model.get("tie", False):
        return 1.0
    default = 1 / model.width if weights.config.mup.enabled else model.width**-0.5
    return model.get("tied_scale", default)
