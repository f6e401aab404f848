"""Where the weights of a new run come from: a Hugging Face folder, or a folder that `save_safetensors` wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from structmat.data.errors import DataError
from structmat.exchange import structured
from structmat.exchange.huggingface import BESIDE, CONFIG, family_of, read_config
from structmat.exchange.structured import Structured
from structmat.exchange.tensor_files import Tensor, tensors_in
from structmat.nn import Site
from structmat.structures import Rules, Structure, StructureError, flatten_leaves, parse


class Source(Protocol):
    """Weights on disk, read one at a time.

    Attributes:
      description: one line for people. model: name of one of ours. fields: its part of the config, without what says how
        to train. kept: files to keep beside the run.
    """

    description: str
    model: str
    fields: Mapping[str, Any]
    kept: tuple[Path, ...]

    def rules(self, given: str) -> str:
        """As `config.structure`: what `given` says of the sites it matches, and for all others what they have."""

    def holds(self, path: str, site: Site) -> bool:
        """Whether the site's weight has this very structure, so that there are `leaves`."""

    def leaves(self, path: str, site: Site) -> dict[str, np.ndarray]:
        """The site's leaves by slash path, where it `holds` them."""

    def matrix(self, path: str, site: Site) -> np.ndarray:
        """The site's weight, f32 (d_in, d_out)."""

    def array(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """A bias, norm or table of positions, f32."""

    def refuse_left(self) -> None:
        """Raise DataError where weights were not asked for: then the model is not theirs."""


class HuggingFace:
    """A folder that `save_pretrained` wrote: config.json and safetensors, in shards or whole.

    Raises:
      DataError: no such folder, a model that is none of ours, or one of ours in a variant that we lack; names the field.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        config = read_config(self._folder)
        self._family = family_of(config, self._folder)
        self.model, self.fields = self._family.model, self._family.fields(config)
        self._tensors = tensors_in(self._folder)
        self._places, self._read = self._family.places(self.fields), set[str]()
        self.kept = tuple(p for name in (CONFIG, *BESIDE) if (p := self._folder / name).is_file())
        limits = [config.get(n) for n in ("max_position_embeddings", "n_positions")]
        own = next((n for n in limits if n), self.fields["context"])
        window = f" of {own:,}, where its sliding window ends" if own != self.fields["context"] else ""
        self.description = (
            f"{self._folder.name}: {config['model_type']}, {self.fields['layers']} layers of width "
            f"{self.fields['width']:,}, vocabulary {self.fields['vocab']:,}, context {self.fields['context']:,}{window}, "
            f"{'head tied to the embedding' if self.fields.get('tie') else 'head of its own'}"
        )

    def rules(self, given: str) -> str:
        """See Source: theirs are all dense."""
        return given or "dense()"

    def holds(self, path: str, site: Site) -> bool:
        """See Source: False, for all theirs come as matrices."""
        return False

    def leaves(self, path: str, site: Site) -> dict[str, np.ndarray]:
        """None to give."""
        raise TypeError(f"{path}: theirs are matrices")

    def matrix(self, path: str, site: Site) -> np.ndarray:
        """See Source. Only the columns of a fused tensor that belong to the site are read."""
        found = self._part(path, 2)
        if found.shape != (site.bound.d_in, site.bound.d_out):
            raise self._unfit(path, found.shape, (site.bound.d_in, site.bound.d_out))
        return found

    def array(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """See Source. Of positions, the first ones that the context needs."""
        found = self._part(path, None)
        if path == "positions" and found.shape[1:] == shape[1:] and len(found) > shape[0]:
            found = found[: shape[0]]
        if found.size != math.prod(shape):
            raise self._unfit(path, found.shape, shape)
        return found.reshape(shape)

    def refuse_left(self) -> None:
        """See Source. Masks, tables of angles and the head of a tied model are no weights of their own."""
        head = {"lm_head.weight"} if self.fields.get("tie") else set()
        left = [n for n in self._tensors if n not in self._read | head and not self._family.ignored(n)]
        if left:
            raise DataError(
                f"{self._folder.name}: {len(left)} tensors have no place in a {self.model}, such as {', '.join(left[:3])}"
            )

    def _part(self, path: str, ndim: int | None) -> np.ndarray:
        place = self._places[path]
        tensor = self._find(place.tensor)
        if ndim is not None and len(tensor.shape) != ndim:
            raise DataError(f"{tensor.file.name}: tensor {tensor.name!r} has shape {tensor.shape}; a matrix is needed")
        if not np.issubdtype(np.dtype(tensor.dtype), np.floating) and tensor.dtype != "bfloat16":
            raise DataError(f"{tensor.file.name}: tensor {tensor.name!r} has dtype {tensor.dtype}; floats are needed")
        parts = []
        if place.parts > 1:
            if tensor.shape[-1] % place.parts:
                raise DataError(f"{tensor.file.name}: {tensor.name!r} {tensor.shape} is not {place.parts} parts")
            parts = [slice(None)] * (len(tensor.shape) - 1) + [place.columns(tensor.shape[-1])]
        found = tensor.read(*parts).astype(np.float32)
        return found.T if place.transposed else found

    def _find(self, name: str) -> Tensor:
        for own in (name, name.removeprefix(self._family.root)):
            if own in self._tensors:
                self._read.add(own)
                return self._tensors[own]
        raise DataError(f"{self._folder.name} has no tensor {name!r}, which its {CONFIG} implies")

    def _unfit(self, path: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> DataError:
        return DataError(f"{self._folder.name}: {self._places[path].tensor} is {found} for our {path} {wanted}")


class Saved:
    """A folder that `save_safetensors` wrote from a run of the lm task.

    Raises:
      DataError: as `structured.open_folder`; or it has no config of such a run.
    """

    def __init__(self, folder: str | Path):
        self._held: Structured = structured.open_folder(folder)
        config, where = self._held.config, Path(folder)
        if not config or config.get("task") != "lm":
            raise DataError(f"{str(folder)!r} was not saved from a run of the lm task; structmat.exchange reads it")
        own = dict(config["model"])
        self.model = own.pop("name")
        self.fields = {k: v for k, v in own.items() if k not in ("dropout", "scan", "remat", "dtype")}
        if own.get("tie"):  # what the default depends on need not hold in the new run
            default = 1 / own["width"] if config["mup"]["enabled"] else own["width"] ** -0.5
            self.fields["tied_scale"] = own.get("tied_scale", default)
        self.kept = tuple(p for name in (CONFIG, *BESIDE) if (p := where / name).is_file())
        self.description = f"{where.name}: {self.model} with {len(self._held.sites)} structured weights"
        self._asked: set[str] = set()

    def rules(self, given: str) -> str:
        """See Source.

        Raises:
          StructureError: a rule matches nothing, or is none.
        """
        kinds = {path: row["kind"] for path, row in self._held.sites.items()}
        matched = Rules.of(given).matched(kinds) if given else {}
        return "; ".join(f"{re.escape(p)} -> {matched.get(p, self._structure(p))}" for p in kinds)

    def holds(self, path: str, site: Site) -> bool:
        """See Source."""
        return self._structure(path) == site.bound.structure

    def leaves(self, path: str, site: Site) -> dict[str, np.ndarray]:
        """See Source."""
        names = [name for name, _ in flatten_leaves(site.bound.leaves())]
        return {name: self._read(f"{path}/{name}") for name in names}

    def matrix(self, path: str, site: Site) -> np.ndarray:
        """See Source."""
        bound = self._structure(path).bind(site.bound.in_shape, site.bound.out_shape)
        if not bound.is_linear:
            raise StructureError(f"site {path}: {bound.structure.short()} is no matrix, so it has no other structure")
        params: dict[str, Any] = {}
        for name, _ in flatten_leaves(bound.leaves()):
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = self._read(f"{path}/{name}")
        return np.asarray(bound.materialize(params), np.float32)

    def array(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """See Source."""
        found = self._read(path)
        if path == "positions" and len(found) > shape[0]:
            found = found[: shape[0]]
        return found.reshape(shape)

    def refuse_left(self) -> None:
        """See Source."""
        if left := [name for name in self._held.arrays if name not in self._asked]:
            raise DataError(f"{len(left)} arrays have no place in the model, such as {', '.join(left[:3])}")

    def _structure(self, path: str) -> Structure:
        return parse(self._held.sites[path]["structure"])

    def _read(self, name: str) -> np.ndarray:
        self._asked.add(name)
        return self._held.read(name)


def source_at(place: str | Path) -> Source:
    """What a folder holds, by the files in it.

    Raises:
      DataError: as the two classes.
    """
    return Saved(place) if (Path(place) / structured.INDEX).is_file() else HuggingFace(place)
