import numpy as np
import pytest

from structmat.data.moved import CROPS, HELDOUT, cropped, draws, moved
from structmat.training.config import default, identity, validate
from structmat.training.errors import ConfigError

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)


def test_draws_are_uniform_and_rows_of_the_batch():
    whole = draws(3, 7, 4000)
    assert whole.shape == (4000, 3) and whole.min() >= -1 and whole.max() < 1
    np.testing.assert_allclose(whole.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(whole.std(0), 3**-0.5, atol=0.02)
    np.testing.assert_array_equal(draws(3, 7, 4000, range(5, 9)), whole[5:9])
    others = [draws(3, 8, 4), draws(4, 7, 4), draws(HELDOUT, 7, 4), draws(3 + CROPS, 7, 4)]
    assert all(not (other == whole[:4]).any() for other in others)


def test_shifts_are_whole_pixels_with_the_edge_repeated():
    image = moved(IMAGES[:1], np.array([[0.9, -0.9, 0.0]]), 1, 0.0)[0, ..., 0]  # one down, one left
    wanted = IMAGES[0, np.r_[0, 0:7]][:, np.r_[1:8, 7], 0]
    np.testing.assert_array_equal(image, wanted)
    counts = np.unique([np.floor((d + 1) / 2 * 5) - 2 for d in draws(0, 0, 3000)[:, 0]], return_counts=True)
    assert list(counts[0]) == [-2, -1, 0, 1, 2] and counts[1].min() > 500


def test_a_quarter_turn_is_that_of_numpy():
    turned = moved(IMAGES, np.tile([0.0, 0.0, 0.5], (3, 1)), 0, 180.0)
    back = moved(IMAGES, np.tile([0.0, 0.0, -0.5], (3, 1)), 0, 180.0)
    np.testing.assert_allclose(turned, np.rot90(IMAGES, 1, (1, 2)), atol=1e-5)
    np.testing.assert_allclose(back, np.rot90(IMAGES, -1, (1, 2)), atol=1e-5)


@pytest.mark.parametrize("task", ["digits", "images"])
def test_tasks_move_what_is_trained_and_what_is_held_out(task):
    plain, config = validate(default(task)).load(), default(task)
    before = identity(config)
    assert not {"shift", "rotation"} & set(before.get("data", {}))  # as before there were these fields
    config.data.update(shift=1, rotation=10.0)
    assert identity(config)["data"] == before["data"] | {"shift": 1, "rotation": 10.0}
    source = validate(config).load()
    one, again, other = source.batch(2), source.batch(2), plain.batch(2)
    np.testing.assert_array_equal(one["images"], again["images"])
    np.testing.assert_array_equal(one["labels"], other["labels"])
    assert (
        one["images"] != other["images"]
    ).any() and "shifted by up to 1 pixels, turned by up to 10 degrees" in source.description
    np.testing.assert_array_equal(source.batch(2, range(3, 6))["images"], one["images"][3:6])
    held = [next(iter(s.heldout())) for s in (source, source, plain)]
    np.testing.assert_array_equal(held[0]["images"], held[1]["images"])
    assert (held[0]["images"] != held[2]["images"]).mean() > 0.3


@pytest.mark.parametrize(("field", "value"), [("shift", -1), ("rotation", 200.0), ("rotation", -1.0)])
def test_moves_that_are_none_are_refused(field, value):
    config = default("digits")
    config.data[field] = value
    with pytest.raises(ConfigError, match=f"config.data.{field} = {value}"):
        validate(config)


def test_crops_are_those_of_padded_images_and_half_are_reflected():
    padded, draw = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0))), draws(0, 0, 600)
    found = cropped(np.repeat(IMAGES[:1], 600, 0), draw, 2, True)
    places = set()
    for image, (_, _, turn) in zip(found, draw):
        straight = image[:, ::-1] if turn > 0 else image
        at = [(y, x) for y in range(5) for x in range(5) if np.array_equal(padded[0, y : y + 8, x : x + 8], straight)]
        assert len(at) == 1
        places.add((*at[0], turn > 0))
    assert len(places) == 50
    straight = cropped(np.repeat(IMAGES[:1], 600, 0), draw, 2, False)
    turned = [image[:, ::-1] if turn > 0 else image for image, (_, _, turn) in zip(found, draw)]
    np.testing.assert_array_equal(straight, np.stack(turned))
    assert cropped(IMAGES, draw[:3], 0, False) is IMAGES
    with pytest.raises(ValueError, match="zip"):
        cropped(IMAGES, draw, 1, False)


def test_held_out_images_are_neither_cropped_nor_reflected():
    plain, config = validate(default("images"), devices=1).load(), default("images")
    config.data.update(crop=2, flip=True)
    source = validate(config, devices=1).load()
    first = lambda s: next(iter(s.heldout()))["images"]
    np.testing.assert_array_equal(first(source), first(plain))
    assert not np.array_equal(source.batch(0, None)["images"], plain.batch(0, None)["images"])
    whole = source.batch(3, None)["images"]
    np.testing.assert_array_equal(source.batch(3, range(2, 5))["images"], whole[2:5])
    for field, value in (("crop", -1), ("crop", 8), ("smoothing", 1.0)):
        config = default("images")
        config.data[field] = value
        with pytest.raises(ConfigError, match=f"data.{field}"):
            validate(config, devices=1)
