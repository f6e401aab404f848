"""Images moved at random: shifts and turns, of every training image anew in each epoch and of every held-out image once; and
the crops and reflections of training images alone."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

HELDOUT = 2**63
"""In place of a seed, which none is: of the draw that moves held-out images."""
CROPS = 2**62
"""Added to the seed: of the draw of crops and reflections."""


def draws(seed: int, step: int, batch: int, rows: range | None = None) -> np.ndarray:
    """float64 (rows, 3) uniform in [-1, 1): down, right and turn of these rows of a step, of all of its batch if None."""
    raw = np.random.Philox(key=[seed, step]).random_raw(3 * batch).reshape(batch, 3)
    return (raw if rows is None else raw[list(rows)]) / 2.0**63 - 1


def moved(images: np.ndarray, draw: np.ndarray, shift: int, rotation: float) -> np.ndarray:
    """Images (n, h, w, channels) of any dtype, shifted and turned about their centre by draw (n, 3) of `draws`.

    Shifts are whole pixels, each of -shift .. shift equally likely; turns are between -rotation and rotation degrees, by
    bilinear interpolation. What comes from outside is the nearest pixel of the edge.

    Raises:
      ValueError: another number of images than of draws.
    """
    if not shift and not rotation:
        return images
    found = np.empty_like(images)
    centre = (np.array(images.shape[1:3]) - 1) / 2
    for image, out, (down, right, turn) in zip(images, found, draw, strict=True):
        offset = np.floor((np.array([down, right]) + 1) / 2 * (2 * shift + 1)) - shift
        angle = np.deg2rad(rotation * turn)
        back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        start = centre - back @ (centre + offset)
        for channel in range(images.shape[3]):
            ndimage.affine_transform(
                image[..., channel], back, start, order=1, mode="nearest", output=out[..., channel]
            )
    return found


def cropped(images: np.ndarray, draw: np.ndarray, crop: int, flip: bool) -> np.ndarray:
    """Images (n, h, w, channels) of any dtype, as crops of their own size out of images with `crop` pixels of zeros around,
    each place equally likely; every second one, at random, reflected left to right if `flip`. By draw (n, 3) of `draws`.

    Raises:
      ValueError: another number of images than of draws.
    """
    if not crop and not flip:
        return images
    found = np.zeros_like(images)
    height, width = images.shape[1:3]
    for image, out, (down, right, turn) in zip(images, found, draw, strict=True):
        y, x = (int(np.floor((d + 1) / 2 * (2 * crop + 1))) - crop for d in (down, right))
        inside = image[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)]
        out[max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)] = inside
        if flip and turn > 0:
            out[:] = out[:, ::-1].copy()
    return found
