import numpy as np
import pytest

from structmat.data.errors import DataError
from structmat.data.mri import acquisition, coils, masks, phantoms

RNG = np.random.default_rng(0)


def pixel(image, x, y):
    n = len(image)
    return image[int((1 - y) / 2 * n), int((x + 1) / 2 * n)]


def test_shepp_logan_has_the_published_values():
    """By hand from Toft's table: skull 1, brain 0.2, ventricles 0, the rest 0.1 more where an ellipse of 0.1 lies."""
    image = phantoms.shepp_logan(400, oversample=1)
    points = {
        (0, 0.9): 1.0,  # skull
        (-0.55, 0.0): 0.2,  # brain
        (0.22, 0.0): 0.0,  # right ventricle
        (-0.22, 0.0): 0.0,  # left ventricle
        (0.0, 0.35): 0.3,  # upper blob, 0.1 on 0.2
        (0.0, 0.12): 0.4,  # small disc where it overlaps the lower end of the blob
        (0.0, 0.08): 0.3,
        (0.0, -0.1): 0.3,
        (-0.08, -0.605): 0.3,
        (0.0, -0.7): 0.2,
        (0.9, 0.9): 0.0,
        # the ventricles lean towards the midline below, as the published picture shows
        (0.2, -0.35): 0.2,
        (0.3, 0.2): 0.0,
        (0.3, -0.2): 0.2,
        (0.14, -0.2): 0.0,
        (-0.34, 0.3): 0.0,
        (-0.1, -0.3): 0.0,
        (-0.34, -0.3): 0.2,
    }
    for (x, y), value in points.items():
        assert pixel(image, x, y) == pytest.approx(value, abs=1e-6), (x, y)
    assert image.dtype == np.float32 and image.min() > -1e-6


def test_pixels_are_area_means_at_every_resolution():
    coarse, fine = phantoms.shepp_logan(32, oversample=4), phantoms.shepp_logan(64, oversample=2)
    np.testing.assert_allclose(coarse, fine.reshape(32, 2, 32, 2).mean((1, 3)), atol=1e-6)
    areas = np.pi * phantoms.SHEPP_LOGAN[:, 1] * phantoms.SHEPP_LOGAN[:, 2] / 4
    assert coarse.mean() == pytest.approx((areas * phantoms.SHEPP_LOGAN[:, 0]).sum(), rel=1e-2)
    coarse, fine = phantoms.random_phantom(32, 7, oversample=4), phantoms.random_phantom(64, 7, oversample=2)
    np.testing.assert_allclose(coarse, fine.reshape(2, 32, 2, 32, 2).mean((2, 4)), atol=1e-6)


def test_echoes_are_two_contrasts_of_one_object():
    first, second = phantoms.random_phantom(48, 3, oversample=2)
    assert ((first > 0) == (second > 0)).all() and 0 < first.max() <= 1
    ratio = second[first > 0] / first[first > 0]
    assert phantoms.DARKEST - 1e-6 <= ratio.min() < ratio.max() <= 1 + 1e-6 and ratio.std() > 0.02
    assert not np.array_equal(first, phantoms.random_phantom(48, 4, oversample=2)[0])
    ellipses, factors = phantoms.random_ellipses(3)
    assert len(ellipses) == len(factors) and phantoms.FEWEST <= len(ellipses) - 2 <= phantoms.MOST


def test_sensitivities_are_normalised_smooth_and_local():
    maps = coils.coil_maps(32, 6, seed=1)
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, atol=2e-6)
    assert maps.dtype == np.complex64 and np.abs(np.diff(maps, axis=-1)).max() < 0.12
    brightest = [np.unravel_index(np.abs(m).argmax(), m.shape) for m in maps]
    assert len(set(brightest)) == 6 and all(0 in b or 31 in b for b in brightest), "each at the border nearest to it"
    fine = coils.coil_maps(64, 6, seed=1).reshape(6, 32, 2, 32, 2).mean((2, 4))
    np.testing.assert_allclose(fine, maps, atol=5e-3)


@pytest.mark.parametrize("pattern", ["random", "regular"])
def test_lines_reach_the_acceleration_with_a_full_centre(pattern):
    for shape, wanted in (((8, 64), 2), ((5, 320), 3), ((3, 101), 4)):
        mask = masks.lines(shape, wanted, seed=2, centre=0.08, pattern=pattern)
        assert mask.shape == shape and mask.dtype == bool and (mask == mask[:1]).all()
        assert masks.acceleration(mask) == pytest.approx(wanted, rel=0.02)
        low = round(0.08 * shape[1])
        held = set(np.flatnonzero(mask[0]))
        assert {i % shape[1] for i in range(-(low // 2), low - low // 2)} <= held
    gaps = np.diff(np.flatnonzero(np.fft.fftshift(masks.lines((1, 64), 2, 2, 0.0, pattern)[0])))
    assert (set(gaps) == {2}) == (pattern == "regular")


@pytest.mark.parametrize("wanted", [2, 4])
def test_poisson_disc_keeps_its_distances(wanted):
    shape = (32, 40)
    mask, scale = masks.poisson_disc(shape, wanted, seed=1, centre=0.125)
    assert masks.acceleration(mask) == pytest.approx(wanted, rel=0.005)
    shifted = np.fft.fftshift(mask)
    centre = np.zeros(shape, bool)
    centre[14:18, 18:23] = True
    assert centre.sum() == round(0.125 * 32) * round(0.125 * 40) and shifted[centre].all()
    at = np.argwhere(shifted & ~centre)
    radius = (np.fft.fftshift(masks.radii(shape)) * scale)[tuple(at.T)]
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1) + 1e9 * np.eye(len(at))
    assert (apart >= np.minimum.outer(radius, radius)).all()
    assert radius.max() > 1.5, "or nothing was asked of any pair"
    y, x = np.meshgrid(*(np.abs(np.fft.fftfreq(n)) for n in shape), indexing="ij")
    low = (y < 0.25) & (x < 0.25)
    assert mask[low].mean() > 1.2 * mask[~low].mean(), "denser towards zero frequency"
    assert not np.array_equal(mask, masks.poisson_disc(shape, wanted, seed=2, centre=0.125)[0])


def test_adjoint():
    draw = lambda *shape: RNG.normal(size=shape) + 1j * RNG.normal(size=shape)
    maps, mask = draw(3, 8, 10), RNG.random((8, 10)) < 0.4
    x, y = draw(2, 8, 10), draw(2, 3, 8, 10)
    there, back = acquisition.forward(x, maps, mask), acquisition.adjoint(y, maps, mask)
    assert there.shape == y.shape and back.shape == x.shape
    assert np.vdot(y, there) == pytest.approx(np.vdot(back, x), rel=1e-13)


def test_full_sampling_is_isometric_and_snr_is_of_its_reconstruction():
    maps, full = coils.coil_maps(32, 4), np.ones((32, 32), bool)
    image = phantoms.random_phantom(32, 0)
    clean = acquisition.acquire(image, maps, full, None, 0)
    assert clean.dtype == np.complex64
    np.testing.assert_allclose(acquisition.adjoint(clean, maps, full), image, atol=2e-6)
    errors = []
    for seed in range(4):
        noisy = acquisition.adjoint(acquisition.acquire(image, maps, full, 20.0, seed), maps, full)
        errors.append((np.abs(noisy - image) ** 2).mean((-2, -1)))
    found = 10 * np.log10((image**2).mean((-2, -1)) / np.mean(errors, 0))
    np.testing.assert_allclose(found, 20, atol=0.25)


def test_scans_are_a_function_of_the_seed_and_noise_stays_within_the_mask():
    machine = acquisition.scanner(16, coils=3, acceleration=2, snr=(20.0, None), seed=5)
    both = acquisition.scans(machine, [4, 9])
    assert both["kspace"].shape == (2, 2, 3, 16, 16) and both["image"].shape == (2, 2, 16, 16)
    np.testing.assert_array_equal(both["kspace"][1:], acquisition.scans(machine, [9])["kspace"])
    assert not both["kspace"][..., ~machine.mask].any()
    left = both["kspace"] - acquisition.forward(both["image"], machine.maps, machine.mask)
    assert np.abs(left[:, 0]).max() > 1e-3 and np.abs(left[:, 1]).max() < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: phantoms.shepp_logan(0), "size is 0"),
        (lambda: phantoms.random_phantom(8, -1), "seed must be at least 0, got -1"),
        (lambda: coils.coil_maps(8, 0), "coils 0"),
        (lambda: masks.lines((8, 8), 0.5), "acceleration is 0.5"),
        (lambda: masks.lines((8, 64), 20, centre=0.2), "leaves 3 columns, but centre=0.2 takes 13"),
        (lambda: masks.lines((8, 8), 2, pattern="spiral"), "pattern is 'spiral'"),
        (lambda: masks.poisson_disc((8,), 2), r"shape is \(8,\)"),
        (lambda: masks.poisson_disc((16, 16), 100, centre=0.5), "leaves 3 samples, but centre=0.5 takes 64"),
        (lambda: acquisition.scanner(16, pattern="spiral"), "'spiral'; valid: poisson_disc"),
        (lambda: acquisition.scanner(16, snr=(3.0,)), "one for each of 2 echoes"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
