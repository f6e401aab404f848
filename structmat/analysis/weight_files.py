"""Dense matrices in .npy and .safetensors files, read one at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401, makes bfloat16 a dtype numpy knows by name
import numpy as np

from structmat.data.errors import DataError
from structmat.structures.rules import matching

Reader = Callable[[], np.ndarray]
_Find = tuple[str, tuple[int, ...], bool, Callable[[int | None], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class FileWeights:
    """What a folder holds, still on disk.

    Attributes:
      readers: name -> a callable that reads one (d_in, d_out) matrix; slice 7 of a stack is `name/7`.
      left_out: name and reason of the arrays that are no matrices.
    """

    readers: dict[str, Reader]
    left_out: tuple[str, ...]


def file_weights(place: str | Path, match: str | None = None, transpose: bool = False) -> FileWeights:
    """The float matrices in a file or in all `.npy` and `.safetensors` files below a folder; reads only their headers.

    Names are a `.npy` file's path in the folder without its suffix, and the tensors' own in a `.safetensors` file.

    Args:
      match: regex the whole name must match; default all.
      transpose: the arrays are (d_out, d_in), as PyTorch stores linear layers.

    Raises:
      DataError: nothing there, an unreadable file, a name twice, or `.safetensors` without the library.
      StructureError: no name matches; lists near ones.
    """
    place = Path(place)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _FORMATS)
    files = [p for p in files if p.suffix in _FORMATS]
    if not files:
        raise DataError(f"{str(place)!r} is or holds no {' or '.join(_FORMATS)} file")
    readers: dict[str, Reader] = {}
    left_out: list[str] = []
    for file in files:
        for name, shape, is_float, read in _FORMATS[file.suffix](file, place):
            if not is_float or len(shape) not in (2, 3):
                left_out.append(f"{name}: shape {shape}{'' if is_float else ', not of floats'}")
                continue
            parts = {name: None} if len(shape) == 2 else {f"{name}/{i}": i for i in range(shape[0])}
            for own, index in parts.items():
                if own in readers:
                    raise DataError(f"{own!r} is in more than one file below {str(place)!r}, the second is {file}")
                readers[own] = functools.partial(_matrix, read, index, transpose)
    if not readers:
        raise DataError(f"{str(place)!r} holds no matrix of floats, only {'; '.join(left_out[:6])}")
    hits = list(readers) if match is None else matching(match, readers)
    return FileWeights({name: readers[name] for name in hits}, tuple(left_out))


def _matrix(read: Callable[[int | None], np.ndarray], index: int | None, transpose: bool) -> np.ndarray:
    return read(index).T if transpose else read(index)


def _npy(file: Path, place: Path) -> Iterator[_Find]:
    def read(index: int | None) -> np.ndarray:
        stored = np.load(file, mmap_mode="r")
        return np.array(stored if index is None else stored[index])

    try:
        header = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a readable .npy file of numbers: {error}") from None
    name = file.stem if file == place else file.relative_to(place).with_suffix("").as_posix()
    yield name, header.shape, np.issubdtype(header.dtype, np.floating), read


def _safetensors(file: Path, place: Path) -> Iterator[_Find]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise DataError(f"reading {file} needs the library safetensors: pip install 'structmat[safetensors]'") from None

    def read(name: str, index: int | None) -> np.ndarray:
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(name) if index is None else tensors.get_slice(name)[index]

    try:
        with safe_open(file, framework="numpy") as tensors:
            about = [(n, tensors.get_slice(n)) for n in tensors.keys()]
            found = [(n, tuple(s.get_shape()), "F" in s.get_dtype()) for n, s in about]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} is not a readable .safetensors file: {error}") from None
    for name, shape, is_float in found:
        yield name, shape, is_float, functools.partial(read, name)


_FORMATS: dict[str, Callable[[Path, Path], Iterator[_Find]]] = {".npy": _npy, ".safetensors": _safetensors}
