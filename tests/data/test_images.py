import numpy as np
import pytest

from structmat.data import images
from structmat.data.errors import DataError

SHAPES = {
    "train_images": (10, 4, 4, 1),
    "train_labels": (10,),
    "test_images": (4, 4, 4, 1),
    "test_labels": (4,),
}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = rng.integers(0, 256, shape, np.uint8) if "images" in name else np.arange(shape[0]) % 3
        np.save(tmp_path / f"{name}.npy", values)
    images.load.cache_clear()
    return tmp_path


def test_a_folder_of_arrays_is_enlarged_by_whole_pixels(folder):
    data = images.load(str(folder))
    assert data.classes == 3 and len(data.sha256) == 64
    batch = images.image_batch(data, 0, 0, 5, 8, 3)
    assert batch["images"].shape == (5, 8, 8, 3) and batch["images"].dtype == np.float32
    assert batch["labels"].dtype == np.int32
    shown = batch["images"].reshape(5, 4, 2, 4, 2, 3)
    assert (shown == shown[:, :, :1, :, :1, :1]).all()
    kept = {(np.asarray(data.train_images[i]).tobytes(), int(data.train_labels[i])) for i in range(10)}
    for image, label in zip(shown[:, :, 0, :, 0, :1], batch["labels"]):
        assert (np.round((image + 1) * 127.5).astype(np.uint8).tobytes(), int(label)) in kept
    part = images.image_batch(data, 0, 0, 5, 8, 3, range(2, 4))
    np.testing.assert_array_equal(part["images"], batch["images"][2:4])


def test_digits_are_the_default():
    data = images.load("")
    assert data.train_images.shape[1:] == (8, 8, 1) and data.classes == 10
    assert images.enlarged(data.test_images[:2], 16, 3).shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("test_labels", None, "no test_labels.npy"),
        ("train_images", np.zeros((10, 4, 4)), r"train_images.npy' holds float64 of shape \(10, 4, 4\)"),
        ("train_images", np.zeros((10, 4, 5, 1), np.uint8), r"\(10, 4, 5, 1\)"),
        ("train_images", np.zeros((9, 4, 4, 1), np.uint8), "9 train images, but 10 labels"),
        ("test_images", np.zeros((4, 2, 2, 1), np.uint8), r"test images \(2, 2, 1\)"),
        ("train_labels", np.full(10, -1), "labels are integers"),
        ("train_labels", np.ones(10, np.float32), "labels are integers"),
    ],
)
def test_malformed_folders_are_refused(folder, name, array, message):
    path = folder / f"{name}.npy"
    path.unlink() if array is None else np.save(path, array)
    with pytest.raises(DataError, match=message):
        images.load(str(folder))


def test_a_model_that_does_not_fit_is_refused(folder):
    data = images.load(str(folder))
    images.check_fit(data, 8, 3, 3)
    for size, channels, classes, message in ((6, 1, 3, "side 6"), (2, 1, 3, "side 2"), (4, 1, 2, "labels reach 2")):
        with pytest.raises(DataError, match=message):
            images.check_fit(data, size, channels, classes)
