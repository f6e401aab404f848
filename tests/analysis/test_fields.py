"""Errors and spectra of sines against their values in closed form; pictures show the numbers they claim."""

import jax.numpy as jnp
import numpy as np
import pytest

from structmat.analysis import field_pictures
from structmat.analysis.fields import energy_spectrum, error_growth, kinetic_spectrum, relative_h1, relative_l2

TAU = 2 * np.pi
N = 16
X, Y = np.meshgrid(np.arange(N) / N, np.arange(N) / N, indexing="ij")


def single(*fields):
    return jnp.asarray(np.stack(fields), jnp.float32)


def test_relative_errors_of_sines():
    truth = single(np.sin(TAU * X), 2 * np.cos(TAU * 3 * Y))
    off = single(0.1 * np.sin(TAU * 2 * X), 0.5 * np.cos(TAU * (3 * X + 4 * Y)))
    np.testing.assert_allclose(relative_l2(truth + off, truth), [0.1, 0.25], rtol=1e-5)
    ratio = lambda a, b: np.sqrt((1 + TAU**2 * a) / (1 + TAU**2 * b))
    np.testing.assert_allclose(relative_h1(truth + off, truth), [0.1 * ratio(4, 1), 0.25 * ratio(25, 9)], rtol=1e-5)
    # on a torus of side 2 the same arrays have half the gradient
    wide = relative_h1(truth + off, truth, length=2.0)
    np.testing.assert_allclose(wide[0], 0.1 * np.sqrt((1 + TAU**2 * 1) / (1 + TAU**2 / 4)), rtol=1e-5)


@pytest.mark.long
def test_any_axes_are_space():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(3, 5, 6, 2)), jnp.float32) for _ in range(2))
    first = lambda z: jnp.moveaxis(z, 3, 1)
    for error in (relative_l2, relative_h1):
        np.testing.assert_allclose(error(a, b, (1, 2)), error(first(a), first(b)), rtol=1e-5)
    np.testing.assert_allclose(energy_spectrum(a, (1, 2)), energy_spectrum(first(a)), rtol=1e-4, atol=1e-7)
    odd_a, odd_b = a[:, :, :5], b[:, :, :5]  # without the mode at half the grid the gradient is the one of the FFT
    slope = lambda z: np.fft.ifft(1j * TAU * np.fft.fftfreq(5, 1 / 5)[:, None] * np.fft.fft(z, axis=2), axis=2).real
    norm = lambda z: np.sqrt(np.sum(np.asarray(z) ** 2 + slope(np.asarray(z)) ** 2, 2))
    np.testing.assert_allclose(relative_h1(odd_a, odd_b, (2,)), norm(odd_a - odd_b) / norm(odd_b), rtol=1e-4)


def test_spectra_put_energy_in_its_shell_and_lose_none():
    fields = single(np.sin(TAU * (3 * X + 4 * Y)), 1 + 2 * np.cos(TAU * 2 * Y))
    energy = np.asarray(energy_spectrum(fields))
    expected = np.zeros((2, 12))
    expected[0, 5] = 0.25
    expected[1, [0, 2]] = 0.5, 1.0
    np.testing.assert_allclose(energy, expected, atol=1e-6)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(4, N, N)), jnp.float32)
    np.testing.assert_allclose(energy_spectrum(noise).sum(-1), 0.5 * (noise**2).mean((1, 2)), rtol=1e-5)
    # vorticity of the velocity (sin 2 pi y, 0) is -2 pi cos 2 pi y; its kinetic energy is 1/4
    kinetic = kinetic_spectrum(single(-TAU * np.cos(TAU * Y)))
    np.testing.assert_allclose(kinetic[0], [0, 0.25] + [0] * 10, atol=1e-6)


def test_growth_of_an_error_that_grows_exponentially():
    times = np.array([0.5, 1.0, 2.0, 4.0])
    truth = np.broadcast_to(np.sin(TAU * X), (2, 4, N, N))
    size = np.stack([1e-3 * np.exp(0.7 * times), 1e-2 * np.exp(-0.3 * times)])
    prediction = truth + size[..., None, None] * np.cos(TAU * 5 * Y)
    errors, rate = error_growth(jnp.asarray(prediction, jnp.float32), jnp.asarray(truth, jnp.float32), times)
    np.testing.assert_allclose(errors, size, rtol=1e-3)
    np.testing.assert_allclose(rate, [0.7, -0.3], atol=1e-3)
    last = lambda a: jnp.moveaxis(jnp.asarray(a, jnp.float32), 1, -1)
    np.testing.assert_allclose(error_growth(last(prediction), last(truth), times, -1, (1, 2)).rate, rate, atol=1e-3)
    with pytest.raises(ValueError, match="for 4 snapshots; needed are as many"):
        error_growth(prediction, truth, times[:3])


def test_pictures_show_fields_errors_and_spectra(tmp_path):
    truth = np.stack([np.sin(TAU * X), 1 + np.cos(TAU * Y)])
    prediction = truth + 0.1 * np.cos(TAU * 2 * X)
    figure = field_pictures.predicted_fields(truth, prediction, ["first", "second"])
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == 6 and panels[3].get_ylabel().startswith("second")
    shown = [panel.images[0] for panel in panels]
    np.testing.assert_allclose(shown[4].get_array(), prediction[1].T)
    np.testing.assert_allclose(shown[2].get_array(), (prediction - truth)[0].T)
    assert shown[0].get_clim() == shown[1].get_clim() and shown[2].get_clim()[1] == pytest.approx(0.1)
    assert panels[2].get_title() == "difference, relative L2 0.1"
    figure.savefig(tmp_path / "fields.png")
    assert (tmp_path / "fields.png").read_bytes()[:4] == b"\x89PNG"

    spectra = field_pictures.field_spectra({"truth": truth, "coarse": truth[:, ::2, ::2]}).axes[0]
    assert [len(line.get_xdata()) for line in spectra.lines] == [7, 3]
    np.testing.assert_allclose(spectra.lines[0].get_ydata()[0], 0.25, rtol=1e-5)
    curve = field_pictures.error_in_time([1.0, 2.0], {"fno": [[0.1, 0.2], [0.3, 0.4]]}).axes[0]
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [0.2, 0.3])
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (spectra, curve))
    for wrong in (truth[0], truth[:0], truth[:1]):
        with pytest.raises(ValueError, match="both must be"):
            field_pictures.predicted_fields(wrong, truth[0] if wrong.ndim == 2 else truth[: 2 * len(wrong)])
