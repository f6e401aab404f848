"""Convolutions with a structured kernel: as factor convolutions where the structure has them, through patches otherwise.

A kernel (*k, cin, cout) is read as a matrix by one of three views, the schemes of Xu et al. 2020 ("TRP") and of the papers
they cite; x is (batch, *space, cin) throughout.

| view | rows | columns | low rank of that matrix is |
|---|---|---|---|
| channel | (*k, cin) | (cout,) | a convolution to r channels, then 1 x 1 |
| spatial | (kh, cin) | (kw, cout) | kh x 1 to r channels, then 1 x kw (Jaderberg et al. 2014) |
| decoupled | (cin,) | (cout, *k) | 1 x 1 to r channels, then a convolution; per output channel, as
  block_low_rank(in_blocks=1, out_blocks=cout, rank=r), pointwise then depthwise (Guo et al. 2018) |

Under `channel` the axes (*k, cin) are also those of a tensor: tucker is 1 x 1 to r channels, a small convolution, 1 x 1
(Kim et al. 2016), cp is 1 x 1, one depthwise convolution per spatial axis, 1 x 1 (Lebedev et al. 2015).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.algebra import BoundSum
from structmat.structures.base import Bound
from structmat.structures.block_low_rank import BoundBlockLowRank
from structmat.structures.cp import BoundCP, khatri_rao
from structmat.structures.dense import BoundDense
from structmat.structures.errors import StructureError, suggest
from structmat.structures.leaf import Params, Shape
from structmat.structures.low_rank import BoundLowRank
from structmat.structures.spectral import BoundSpectral
from structmat.structures.tucker import BoundTucker
from structmat.structures.wrappers import BoundFrozen, BoundScaled

View = Literal["channel", "spatial", "decoupled"]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a kernel is applied: window, strides, dilation and explicit zero padding, one entry per spatial axis."""

    window: Shape
    strides: Shape
    dilation: Shape
    padding: tuple[tuple[int, int], ...]

    def axis(self, k: int) -> Geometry:
        """The same along spatial axis k, a window of 1 along the others."""
        only = lambda values, rest: tuple(v if i == k else rest for i, v in enumerate(values))
        return Geometry(only(self.window, 1), only(self.strides, 1), only(self.dilation, 1), only(self.padding, (0, 0)))

    def out(self, space: Sequence[int]) -> Shape:
        """Spatial shape of the output."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.window)]
        return tuple((n + sum(p) - r) // s + 1 for n, p, r, s in zip(space, self.padding, reach, self.strides))


def view_shapes(view: View, window: Shape, cin: int, cout: int) -> tuple[Shape, Shape]:
    """(in_shape, out_shape) of the matrix a view makes of a kernel (*window, cin, cout).

    Raises:
      StructureError: an unknown view, or `spatial` of a kernel that has not two spatial axes.
    """
    if view not in get_args(View):
        raise StructureError(f"conv: view={view!r}" + suggest(str(view), get_args(View)))
    if view == "spatial" and len(window) != 2:
        raise StructureError(f"conv: view='spatial' splits a two-dimensional window, got {window}; use view='channel'")
    if view == "channel":
        return (*window, cin), (cout,)
    return ((window[0], cin), (window[1], cout)) if view == "spatial" else ((cin,), (cout, *window))


def view_of(in_shape: Shape, out_shape: Shape) -> tuple[View, Shape] | None:
    """(view, window) of the convolution whose matrix has these sides, as `view_shapes` makes them; None of a plain matrix."""
    if len(out_shape) == 1:
        return ("channel", in_shape[:-1]) if len(in_shape) > 1 else None
    if len(in_shape) == 1:
        return "decoupled", out_shape[1:]
    return ("spatial", (in_shape[0], out_shape[0])) if len(in_shape) == len(out_shape) == 2 else None


def kernel_of(matrix: jax.Array, view: View, window: Shape, cin: int, cout: int) -> jax.Array:
    """The kernel (*window, cin, cout) whose view is `matrix`."""
    if view == "channel":
        return matrix.reshape(*window, cin, cout)
    if view == "spatial":
        return matrix.reshape(window[0], cin, window[1], cout).transpose(0, 2, 1, 3)
    return jnp.moveaxis(matrix.reshape(cin, cout, *window), (0, 1), (-2, -1))


def matrix_of(kernel: jax.Array, view: View) -> jax.Array:
    """The matrix of a kernel (*window, cin, cout), the inverse of `kernel_of`: what `project` takes."""
    *window, cin, cout = kernel.shape
    rows, columns = view_shapes(view, tuple(window), cin, cout)
    if view == "spatial":
        kernel = kernel.transpose(0, 2, 1, 3)
    elif view == "decoupled":
        kernel = jnp.moveaxis(kernel, (-2, -1), (0, 1))
    return kernel.reshape(math.prod(rows), math.prod(columns))


def convolve(x: jax.Array, kernel: jax.Array, geometry: Geometry, groups: int = 1) -> jax.Array:
    """x (batch, *space, cin) with a kernel (*window, cin / groups, cout) -> (batch, *out, cout)."""
    space = "".join(chr(ord("0") + k) for k in range(len(geometry.window)))
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )


def patches(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The windows of x as vectors ordered (*window, cin): (batch, *out, prod(window) cin). Copies, no arithmetic."""
    out = geometry.out(x.shape[1:-1])
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0)))

    def shifted(offsets: tuple[int, ...]) -> jax.Array:
        start = [o * d for o, d in zip(offsets, geometry.dilation)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, out, geometry.strides)]
        return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *geometry.strides, 1))

    return jnp.concatenate([shifted(o) for o in itertools.product(*map(range, geometry.window))], axis=-1)


def has_factors(bound: Bound, view: View) -> bool:
    """Whether `convolve_factored` applies: always for `channel` (through patches), else where factors exist."""
    if isinstance(bound, BoundSum):
        return all(has_factors(t, view) for t in bound.terms)
    if isinstance(bound, BoundFrozen | BoundScaled):
        return has_factors(bound.inner, view)
    return view == "channel" or _factors(bound, view) is not None


def convolve_factored(bound: Bound, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    """The convolution without its dense kernel.

    Raises:
      StructureError: a view other than `channel` for which the structure has no factor convolutions.
    """
    if isinstance(bound, BoundSum):
        terms = ((t, params[str(i)]) for i, t in enumerate(bound.terms))
        return sum(convolve_factored(t, p, x, geometry, view) for t, p in terms)
    if isinstance(bound, BoundScaled):
        return bound.structure.s * convolve_factored(bound.inner, params, x, geometry, view)
    if isinstance(bound, BoundFrozen):
        return convolve_factored(bound.inner, params, x, geometry, view)
    factors = _factors(bound, view)
    if factors is not None:
        return factors(bound, params, x, geometry, view)
    if view != "channel":
        raise StructureError(
            f"conv: {bound.structure.short()} has no factor convolutions under view={view!r}; use view='channel', or "
            "path='dense'"
        )
    return bound.matmul(params, patches(x, geometry))


def convolve_dense(bound: Bound, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    """The convolution with the materialised kernel."""
    cin = x.shape[-1]
    cout = bound.d_in * bound.d_out // (cin * math.prod(geometry.window))
    return convolve(x, kernel_of(bound.materialize(params), view, geometry.window, cin, cout), geometry)


# -- factor convolutions of each structure ---------------------------------------------------------------------------------

Factored = Callable[[Any, Params, jax.Array, Geometry, View], jax.Array]


def _dense(bound: Bound, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    return convolve_dense(bound, params, x, geometry, view)


def _low_rank(bound: Bound, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    return _two_stage(params["a"], params["b"], x, geometry, view)


def _spectral(bound: Bound, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    return _two_stage(params["u"], params["s"][:, None] * params["v"], x, geometry, view)


def _two_stage(a: jax.Array, b: jax.Array, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    """a (r, d_in), b (r, d_out)."""
    rank, cin, window = a.shape[0], x.shape[-1], geometry.window
    if view == "channel":
        return convolve(x, a.T.reshape(*window, cin, rank), geometry) @ b
    if view == "spatial":
        down = convolve(x, a.T.reshape(window[0], 1, cin, rank), geometry.axis(0))
        return convolve(down, b.reshape(rank, window[1], -1).transpose(1, 0, 2)[None], geometry.axis(1))
    return convolve(x @ a.T, kernel_of(b, view, window, rank, b.shape[1] // math.prod(window)), geometry)


def _block_low_rank(
    bound: BoundBlockLowRank, params: Params, x: jax.Array, geometry: Geometry, view: View
) -> jax.Array:
    """Pointwise to (cout, r) channels, then each output channel sums its own r windows."""
    _, cin, cout, _, rank = bound.sizes
    z = x @ params["R"].reshape(cin, cout * rank)
    kernel = params["L"].reshape(cout, rank, *geometry.window)
    return convolve(z, jnp.moveaxis(kernel, (0, 1), (-1, -2)), geometry, groups=cout)


def _tucker(bound: BoundTucker, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    axes, (spatial, rank) = len(geometry.window), (params["core"], bound.format.ranks)
    for k in range(axes):
        spatial = jnp.moveaxis(jnp.tensordot(params[f"factor{k}"], spatial, ((1,), (k,))), 0, k)
    kernel = spatial.reshape(*geometry.window, rank[axes], -1)
    y = convolve(x @ params[f"factor{axes}"], kernel, geometry)
    y = y.reshape(*y.shape[:-1], *rank[axes + 1 :])
    for k in range(axes + 1, len(rank)):
        y = jnp.tensordot(y, params[f"factor{k}"], ((y.ndim - len(rank) + axes + 1,), (1,)))
    return y.reshape(*y.shape[: axes + 1], -1)


def _cp(bound: BoundCP, params: Params, x: jax.Array, geometry: Geometry, view: View) -> jax.Array:
    factors = [params[f"factor{k}"] for k in range(len(bound.format.axes))]
    *spatial, channels = factors[: bound.inputs]
    y = x @ channels
    for k, factor in enumerate(spatial):
        window = [1] * len(spatial)
        window[k] = factor.shape[0]
        y = convolve(y, factor.reshape(*window, 1, -1), geometry.axis(k), groups=factor.shape[1])
    return y @ khatri_rao(factors[bound.inputs :]).T


def _factors(bound: Bound, view: View) -> Factored | None:
    """The factor convolutions of a structure under a view."""
    if isinstance(bound, BoundBlockLowRank):
        per_output = view == "decoupled" and bound.in_blocks == 1 and bound.order == "blocked"
        return _block_low_rank if per_output and bound.out_blocks == bound.out_shape[0] else None
    if isinstance(bound, BoundTucker | BoundCP):
        return None if view != "channel" else _tucker if isinstance(bound, BoundTucker) else _cp
    return _FACTORED.get(type(bound))


_FACTORED: dict[type[Bound], Factored] = {
    BoundDense: _dense,
    BoundLowRank: _low_rank,
    BoundSpectral: _spectral,
}
