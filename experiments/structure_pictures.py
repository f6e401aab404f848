"""Pictures of all structures: the entries of a small sampled member beside the arrays it is made of.

`python -m experiments.structures --write` draws them for the page of structures. A picture carries in its metadata which
member it shows and a figure of its matrix, so that a test can tell when one is out of date.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from structmat.structures import Bound, parse

SIZE = 32
"""Rows and columns of what is drawn."""
DPI = 110
MANY = 8
"""Arrays drawn at most; more are stages alike."""


def member(text: str) -> tuple[Bound, dict[str, Any]]:
    """A structure of SIZE x SIZE, and parameters drawn from its initialisation with key 0."""
    bound = parse(text).bind(SIZE, SIZE)
    return bound, bound.init(jax.random.key(0))


def note(text: str) -> dict[str, str]:
    """What the picture of a structure says of itself: which member, and the mean of |W| where it is a matrix."""
    bound, params = member(text)
    return {"Title": str(bound.structure), "Comment": _mean(bound, params)}


def noted(path: Path) -> dict[str, str]:
    """The note in a file."""
    with Image.open(path) as picture:
        return {name: picture.info.get(name, "") for name in ("Title", "Comment")}


def _mean(bound: Bound, params: Mapping[str, Any]) -> str:
    return f"mean |W| = {float(jnp.mean(jnp.abs(bound.materialize(params)))):.3g}" if bound.is_linear else "no matrix"


def sheet(array: Any) -> np.ndarray:
    """An array as one picture: a vector as a row, more axes as tiles of the last two with gaps (NaN) between.

    Args:
      array: (..., a, b), (a,) or (); of complex entries the real part is shown.
    """
    values = np.real(np.asarray(array)).astype(float)
    if values.ndim < 3:
        return np.atleast_2d(values)
    rows = math.prod(values.shape[:-3])
    tiles = values.reshape(rows, values.shape[-3], *values.shape[-2:])
    down, across, a, b = tiles.shape
    found = np.full((down * (a + 1) - 1, across * (b + 1) - 1), np.nan)
    for i in range(down):
        for j in range(across):
            found[i * (a + 1) : i * (a + 1) + a, j * (b + 1) : j * (b + 1) + b] = tiles[i, j]
    return found


def arrays(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(slash path, array) of nested parameters."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from arrays(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _show(panel: Any, values: np.ndarray, title: str, colors: str) -> None:
    """Red above zero, white at it, blue below, or shades of grey; what is between tiles is light grey."""
    found = colormaps[colors].with_extremes(bad="0.9")
    top = float(np.nanquantile(np.abs(values), 0.98)) or 1.0
    panel.imshow(values, cmap=found, vmin=0 if colors == "Greys" else -top, vmax=top, interpolation="nearest")
    panel.set_title(title, fontsize=8)
    panel.set_xticks([])
    panel.set_yticks([])


def draw(text: str, path: Path) -> Path:
    """Draw a structure into a PNG file: at the left its matrix (the real part of a complex one), red above zero, white at it and
    blue below, at the right its arrays; those of integers or masks in grey. What is no matrix shows its arrays alone."""
    bound, params = member(text)
    drawn = list(arrays(params))
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    figure.set_facecolor("white")
    left, right = figure.subfigures(1, 2, width_ratios=(2.3, 4.7))
    if bound.is_linear:
        name = "real part of W" if bound.is_complex else "W"
        _show(left.subplots(), sheet(bound.materialize(params)), f"{name}\n{SIZE} x {SIZE}", "RdBu_r")
    else:
        left.text(0.5, 0.5, "not a matrix", ha="center", va="center", fontsize=9)
    columns = min(len(drawn), 4)
    panels = right.subplots(-(-min(len(drawn), MANY) // columns), columns, squeeze=False).ravel() if drawn else []
    for panel, (name, array) in zip(panels, drawn[:MANY]):
        floating = jnp.issubdtype(array.dtype, jnp.inexact)
        shape = " x ".join(map(str, array.shape)) or "a number"
        _show(panel, sheet(array), f"{name}\n{shape}", "RdBu_r" if floating else "Greys")
    for panel in panels[len(drawn) :]:
        panel.axis("off")
    if not drawn:
        right.text(0.5, 0.5, "no parameters", ha="center", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None, **note(text)})
    _shrink(path)
    return path


GALLERY = (
    *("low_rank(rank=2)", "monarch(blocks=4)", "block_tensor_train(rank=1)", "kronecker()", "tensor_train(rank=2)"),
    *("tucker(rank=4)", "block_diagonal(blocks=4)", "random_sparse(density=0.1)", "n_m_sparse(n=1, m=4)"),
    *("block_sparse(block=4, density=0.25)", "channel_sparse(density=0.1)", "blast(blocks=4, rank=2)"),
    *("toeplitz() @ diagonal()", "block_circulant(block=8)", "butterfly()", "fourier()", "dct()"),
    *("hadamard()", "householder(reflections=2)", "quantized(bits=2, group=16)", "toeplitz()"),
)
"""What the picture at the top of README shows."""


def gallery(path: Path, columns: int = 7) -> Path:
    """Draw the matrices of GALLERY into one PNG file, each under its text."""
    texts = GALLERY
    figure = Figure(figsize=(1.6 * columns, 1.85 * -(-len(texts) // columns)), layout="constrained")
    figure.set_facecolor("white")
    panels = figure.subplots(-(-len(texts) // columns), columns, squeeze=False).ravel()
    for panel, text in zip(panels, texts):
        bound, params = member(text)
        _show(panel, sheet(bound.materialize(params)), textwrap.fill(text, 30, break_long_words=False), "RdBu_r")
        panel.title.set_fontsize(7)
    for panel in panels[len(texts) :]:
        panel.axis("off")
    figure.savefig(path, dpi=DPI, metadata={"Software": None, "Title": "; ".join(texts), "Comment": "real parts"})
    _shrink(path)
    return path


def _shrink(path: Path) -> None:
    """Keep 64 colours: a picture is some kilobytes."""
    with Image.open(path) as picture:
        info, small = dict(picture.info), picture.convert("RGB").quantize(64)
    kept = PngInfo()
    for name in ("Title", "Comment"):
        kept.add_text(name, info[name])
    small.save(path, optimize=True, pnginfo=kept)
