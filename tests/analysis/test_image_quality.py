import jax
import numpy as np
import pytest
from scipy import ndimage

from structmat.analysis.image_quality import psnr, ssim

RNG = np.random.default_rng(0)
CLEAN = ndimage.gaussian_filter(RNG.random((2, 24, 29)), (0, 2, 2))
NOISY = CLEAN + 0.05 * RNG.normal(size=CLEAN.shape)


def by_scipy(x, y, peak, window):
    """Wang et al. 2004 with scipy's filters, cropped to whole windows."""
    if window == "gaussian":
        edge, local = 5, lambda a: ndimage.gaussian_filter(a, 1.5, truncate=3.5)
        scale = 1.0
    else:
        edge, local = 3, lambda a: ndimage.uniform_filter(a, 7)
        scale = 49 / 48
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mx, my = local(x), local(y)
    vx, vy, vxy = (scale * (local(a * b) - local(a) * local(b)) for a, b in ((x, x), (y, y), (x, y)))
    s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return s[edge:-edge, edge:-edge].mean()


def test_psnr_in_closed_form():
    reference = np.zeros((3, 4, 5))
    reference[..., 0, 0] = 2.0
    image = reference + np.array([0.2, 0.02, 0.002])[:, None, None] * np.where(np.indices((4, 5)).sum(0) % 2, 1, -1)
    np.testing.assert_allclose(psnr(image, reference), [20, 40, 60], atol=1e-4)
    np.testing.assert_allclose(psnr(image, reference, 1.0), np.array([20, 40, 60]) - 20 * np.log10(2), atol=1e-4)
    assert psnr(reference[0], reference[0]) == np.inf
    np.testing.assert_allclose(psnr(reference + 0.2j, reference), 20, atol=1e-4)


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_is_that_of_scipy(window):
    with jax.enable_x64(True):
        found = ssim(NOISY, CLEAN, 1.0, window)
        expected = [by_scipy(x, y, 1.0, window) for x, y in zip(NOISY, CLEAN)]
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert (found < 0.95).all()
        np.testing.assert_allclose(
            ssim(NOISY, CLEAN, None, window)[1], by_scipy(NOISY[1], CLEAN[1], CLEAN[1].max(), window)
        )
        np.testing.assert_allclose(ssim(CLEAN, CLEAN, window=window), 1, rtol=1e-12)
    np.testing.assert_allclose(
        ssim(NOISY.astype(np.float32), CLEAN.astype(np.float32), 1.0, window), expected, atol=1e-4
    )


def test_ssim_of_constants_in_closed_form():
    a, b = np.full((11, 11), 0.3), np.full((11, 11), 0.6)
    expected = (2 * 0.18 + 1e-4) / (0.09 + 0.36 + 1e-4)
    np.testing.assert_allclose(ssim(a, b, 1.0), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((CLEAN, CLEAN, 1.0, "box"), "window is 'box'"),
        ((CLEAN + 0j, CLEAN), "pass magnitudes"),
        ((CLEAN, CLEAN[0]), r"\(2, 24, 29\) and reference \(24, 29\)"),
        ((CLEAN[:, :10], CLEAN[:, :10]), "at least 11"),
    ],
)
def test_what_has_no_ssim_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        ssim(*args)
