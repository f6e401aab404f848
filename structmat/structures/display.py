"""How a Matrix looks: its leaves as rows, and an HTML card with a picture of |W| for notebooks; nothing is imported for it."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.leaf import Leaf, Leaves

if TYPE_CHECKING:
    from structmat.structures.matrix import Matrix

LARGEST = 512
"""Matrices with a longer side are not materialised for a picture."""
_SHOWN = 256  # pixels on the longer side


class LeafSummary(NamedTuple):
    """One array of a Matrix; `rms` is the root mean square of its entries, None for integers."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    rms: float | None


def summarize(leaves: Leaves, params: dict[str, Any], prefix: str = "") -> dict[str, LeafSummary]:
    """Slash path -> LeafSummary in declared order; reads the values, so not under a transformation."""
    rows: dict[str, LeafSummary] = {}
    for name, leaf in leaves.items():
        value = params[name]
        if not isinstance(leaf, Leaf):
            rows |= summarize(leaf, value, f"{prefix}{name}/")
            continue
        inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        rms = float(jnp.sqrt(jnp.mean(jnp.abs(value.astype(jnp.promote_types(value.dtype, jnp.float32))) ** 2)))
        rows[prefix + name] = LeafSummary(value.shape, str(value.dtype), leaf.trainable, rms if inexact else None)
    return rows


def png(levels: np.ndarray) -> bytes:
    """An 8-bit grey PNG of uint8 `levels` (rows, columns), 0 is black."""
    rows, columns = levels.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # every line starts with its filter, 0 for none
    lines[:, 1:] = levels
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def grey(w: jax.Array) -> np.ndarray:
    """uint8 levels of |w|: 255 (white) for zero, 0 (black) for the 99.5th percentile of the nonzero entries and above."""
    size = np.abs(np.asarray(w, np.complex128))
    size = np.where(np.isfinite(size), size, np.inf)
    top = np.percentile(size[size > 0], 99.5) if (size > 0).any() else 1.0
    top = top if np.isfinite(top) else 1.0
    return np.round(255 * (1 - np.clip(size / top, 0, 1))).astype(np.uint8)


def to_html(matrix: Matrix) -> str:
    """A card: what `repr` says, a table of the leaves, and a picture of |W| when no side exceeds LARGEST."""
    cells = []
    for name, leaf in summarize(matrix.bound.leaves(), matrix.params).items():
        rms = "" if leaf.rms is None else f"{leaf.rms:.3g}"
        texts = (name, "×".join(map(str, leaf.shape)), leaf.dtype, "yes" if leaf.trainable else "no", rms)
        cells.append("<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in texts) + "</tr>")
    head = "".join(f"<th>{t}</th>" for t in ("leaf", "shape", "dtype", "trains", "rms"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>" if cells else ""
    return f"<div><code>{html.escape(repr(matrix))}</code>{table}{_image(matrix)}</div>"


def _image(matrix: Matrix) -> str:
    if max(matrix.shape) > LARGEST:
        return ""
    data = base64.b64encode(png(grey(matrix.materialize()))).decode()
    rows, columns = (max(1, round(n * _SHOWN / max(matrix.shape))) for n in matrix.shape)
    style = f"width:{columns}px;height:{rows}px;image-rendering:pixelated;border:1px solid #ccc"
    return f'<img alt="|W|" title="|W|, black is large" style="{style}" src="data:image/png;base64,{data}"/>'
