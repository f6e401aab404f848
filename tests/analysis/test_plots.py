"""Pictures show the numbers they claim, with labelled axes and nothing left behind."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.analysis.plots import error_curve, factor_images, spectrum, weight_image

W = np.random.default_rng(0).normal(size=(12, 18)).astype(np.float32)


@pytest.fixture(scope="module")
def sparse():
    return structmat.project(W, "low_rank(rank=2) + random_sparse(density=0.25, select='magnitude')")


def panels(figure):
    """The axes that are not colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def labelled(figure):
    return all(axes.get_xlabel() and axes.get_ylabel() for axes in panels(figure))


def test_weight_image_shows_magnitudes_on_one_scale(sparse):
    figure = weight_image([W, sparse, jnp.asarray(2 * W, jnp.bfloat16)])
    shown = [axes.images[0] for axes in panels(figure)]
    np.testing.assert_array_equal(shown[0].get_array(), np.abs(W))
    np.testing.assert_allclose(shown[1].get_array(), np.abs(sparse.materialize()))
    assert {image.get_clim() for image in shown} == {(0.0, float(np.abs(shown[2].get_array()).max()))}
    titles = [axes.get_title().replace("\n", " ") for axes in panels(figure)]
    assert titles == ["dense (1)", sparse.structure.short(), "dense (2)"] and labelled(figure)


def test_factor_images_show_every_leaf(sparse):
    figure = factor_images(sparse)
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles[1:] == ["0/a (2, 12)", "0/b (2, 18)", "1/values (18, 3)", "1/rows (18, 3)"] and labelled(figure)
    shown = [np.asarray(axes.images[0].get_array()) for axes in panels(figure)]
    np.testing.assert_allclose(shown[0], np.abs(sparse.materialize()))
    np.testing.assert_array_equal(shown[1], np.abs(sparse.params["0"]["a"]))
    np.testing.assert_array_equal(shown[4], sparse.params["1"]["rows"])
    stacked = panels(factor_images(structmat.project(W, "kronecker(terms=2)")))[1]
    assert stacked.images[0].get_array().shape == (2 * 4, 3), "matrices of a leaf below one another"
    row = panels(factor_images(structmat.project(np.eye(4, dtype=np.float32), "diagonal()")))[1]
    assert row.images[0].get_array().shape == (1, 4)


def test_spectrum_holds_the_singular_values(sparse):
    low = structmat.project(W, "low_rank(rank=2)")
    figure = spectrum({"dense": W, "projected": low})
    axes = figure.axes[0]
    assert axes.get_yscale() == "log" and labelled(figure)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["dense", "projected"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.linalg.svd(W, compute_uv=False))
    np.testing.assert_allclose(axes.lines[1].get_ydata()[:2], low.spectrum()[:2], rtol=1e-5)
    assert len(spectrum(np.diag([2.0, 1.0, 0.0])).axes[0].lines[0].get_ydata()) == 2, "a zero has no logarithm"


def test_error_curve_tells_the_best_apart():
    curves = {"a": [(0.5, 0.2), (0.1, 0.4)], "b": [(0.1, 0.3), (0.4, 0.1)], "c": [(0.2, 0.9)]}
    figure = error_curve(curves, "bits", "error", top=2)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log",
        "log",
        "bits",
        "error",
    )
    drawn = {line.get_label(): [*zip(line.get_xdata(), line.get_ydata())] for line in axes.lines}
    assert drawn == {"1 others": [(0.2, 0.9)], "b": [(0.1, 0.3), (0.4, 0.1)], "a": [(0.1, 0.4), (0.5, 0.2)]}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["b", "a", "1 others"]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: weight_image([]), "nothing to plot: no matrix was given"),
        (lambda: spectrum(np.ones((2, 3, 4))), r"a picture needs a matrix, got an array of shape \(2, 3, 4\)"),
        (lambda: error_curve({"a": []}, "x", "y"), "nothing to plot: no candidate fits"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act()


def test_pyplot_is_never_loaded():
    code = (
        "import sys, numpy, structmat, structmat.analysis.choose; assert 'matplotlib' not in sys.modules\n"
        "from structmat.analysis.plots import weight_image; weight_image(numpy.eye(2)).savefig('/dev/null', format='png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
