"""Labelled images: a user's folder of .npy arrays, or scikit-learn's digits; enlarged by whole pixels where asked."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from structmat.data import digits
from structmat.data.batches import shuffled_indices
from structmat.data.corpus import content_hash
from structmat.data.errors import DataError
from structmat.data.moved import CROPS, cropped, draws, moved

NAMES = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, eq=False)
class Images:
    """Images (n, side, side, channels) uint8 or float32, possibly memory-mapped; labels integer (n,), from 0."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    sha256: str
    description: str

    @property
    def classes(self) -> int:
        """Largest label + 1."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


@lru_cache(maxsize=2)
def load(root: str = "") -> Images:
    """The images in a folder, or the digits if `root` is empty.

    Args:
      root: folder of train_images.npy, train_labels.npy, test_images.npy and test_labels.npy: images (n, side, side,
        channels) uint8, or float32 ready for the model; labels integer (n,), from 0.

    Raises:
      DataError: a file is missing, or not as above; names it.
    """
    if not root:
        held = digits.load()
        square = lambda a: a.reshape(-1, 8, 8, 1)
        parts = (square(held.train_images), held.train_labels, square(held.test_images), held.test_labels)
        return Images(*parts, held.sha256, held.description)
    arrays = {name: _array(Path(root), name) for name in NAMES}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if len(images) != len(labels):
            raise DataError(f"{root!r}: {len(images)} {part} images, but {len(labels)} labels")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        shapes = [arrays[f"{part}_images"].shape[1:] for part in ("train", "test")]
        raise DataError(f"{root!r}: train images are {shapes[0]}, test images {shapes[1]}")
    counts = f"{len(arrays['train_labels'])} train, {len(arrays['test_labels'])} test"
    return Images(**arrays, sha256=content_hash(*arrays.values()), description=f"{Path(root).name}: {counts}")


def check_fit(data: Images, size: int, channels: int, classes: int) -> None:
    """Refuse a model of another image size, other channels or fewer classes.

    Raises:
      DataError: names what is there and what was asked for.
    """
    _, side, _, stored = data.train_images.shape
    if size % side or channels % stored or (channels != stored and stored != 1):
        raise DataError(
            f"{data.description}: images of side {side} and {stored} channels cannot be made into side {size} and "
            f"{channels}; the side may be a multiple, a single channel may be repeated"
        )
    if data.classes > classes:
        raise DataError(f"{data.description}: labels reach {data.classes - 1}, but the model has {classes} classes")


def enlarged(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """float32 (n, size, size, channels): uint8 scaled to [-1, 1], pixels and a single channel repeated."""
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 127.5 - 1
    factor = size // images.shape[1]
    images = images.repeat(factor, 1).repeat(factor, 2).repeat(channels // images.shape[3], 3)
    return np.ascontiguousarray(images, np.float32)


def image_batch(
    data: Images,
    seed: int,
    step: int,
    batch: int,
    size: int,
    channels: int,
    rows: range | None = None,
    shift: int = 0,
    rotation: float = 0.0,
    crop: int = 0,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """`{"images": float32 (rows, size, size, channels), "labels": int32 (rows,)}`; every image once per epoch.

    shift, rotation: pixels, before images are enlarged, and degrees of `moved`. crop, flip: of `cropped`, after these.
    """
    index = shuffled_indices(len(data.train_labels), seed, step, batch, rows)
    images = moved(data.train_images[index], draws(seed, step, batch, rows), shift, rotation)
    images = cropped(images, draws(seed + CROPS, step, batch, rows), crop, flip)
    return {
        "images": enlarged(images, size, channels),
        "labels": data.train_labels[index].astype(np.int32),
    }


def _array(root: Path, name: str) -> np.ndarray:
    path = root / f"{name}.npy"
    if not path.is_file():
        raise DataError(f"no {path.name} in {str(root)!r}; needed are {', '.join(n + '.npy' for n in NAMES)}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise DataError(f"{str(path)!r} is not a readable .npy file: {e}") from e
    if name.endswith("labels"):
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array) or array.min() < 0:
            raise DataError(
                f"{str(path)!r} holds {array.dtype.name} of shape {array.shape}; labels are integers (n,), n >= 1, from 0"
            )
    elif array.ndim != 4 or array.shape[1] != array.shape[2] or array.dtype.name not in ("uint8", "float32"):
        raise DataError(
            f"{str(path)!r} holds {array.dtype.name} of shape {array.shape}; "
            "images are uint8 or float32 (n, side, side, channels)"
        )
    return array
