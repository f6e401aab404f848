"""scikit-learn's handwritten digits: 1797 images of 8 x 8, bundled with the package, so always there."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from structmat.data.batches import shuffled_indices
from structmat.data.corpus import content_hash

TEST_FRACTION = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Digits:
    """Images float32 (n, 64) standardised by the training pixels' overall mean and deviation; labels int32 (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    sha256: str
    description: str
    classes: int = 10


@lru_cache(maxsize=1)
def load() -> Digits:
    """The stratified 80/20 split, fixed once for every seed: seeds vary the training, never the test set."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images, labels = bunch.data.astype(np.float32), bunch.target.astype(np.int32)
    rng = np.random.Generator(np.random.Philox(SPLIT_SEED))
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # argsort of raw 64-bit draws: numpy promises the bit stream for ever, but not what permutation() makes of it
        order = np.argsort(rng.bit_generator.random_raw(len(members)), kind="stable")
        test[members[order[: round(TEST_FRACTION * len(members))]]] = True
    mean, std = images[~test].mean(dtype=np.float64), images[~test].std(dtype=np.float64)
    scaled = ((images - mean) / std).astype(np.float32)
    parts = (scaled[~test], labels[~test], scaled[test], labels[test])
    for part in parts:
        part.flags.writeable = False
    raw_hash = content_hash(images[~test], labels[~test], images[test], labels[test])
    return Digits(*parts, raw_hash, f"scikit-learn digits: {len(parts[1])} train, {len(parts[3])} test")


def digits_batch(seed: int, step: int, batch: int, rows: range | None = None) -> dict[str, np.ndarray]:
    """`{"images": float32 (rows, 64), "labels": int32 (rows,)}` of the training part; every image once per epoch."""
    data = load()
    index = shuffled_indices(len(data.train_labels), seed, step, batch, rows)
    return {"images": data.train_images[index], "labels": data.train_labels[index]}


def heldout_set() -> dict[str, np.ndarray]:
    """The whole test part in the same form as a batch."""
    data = load()
    return {"images": data.test_images, "labels": data.test_labels}
