"""A convolution whose kernel is any structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from structmat.nn.leaves import cast, compute_dtype, declare
from structmat.nn.linear import PATHS, PROBE, check_auxiliary, check_field
from structmat.nn.path import choose_path
from structmat.nn.sites import record
from structmat.structures import Structure, StructureError, parse
from structmat.structures.convolution import (
    Geometry,
    View,
    convolve,
    convolve_dense,
    convolve_factored,
    has_factors,
    kernel_of,
    view_shapes,
)
from structmat.structures.leaf import Axes, Shape

Padding = str | int | Sequence[int | tuple[int, int]]


class StructuredConv(nn.Module):
    """As `flax.linen.Conv`, with a `structure`: x `(..., *space, cin)` -> `(..., *space', features)`.

    Attributes:
      features: output channels.
      kernel_size: window, an int for one spatial axis or one int per axis.
      structure: recipe or its text; the weight of the kernel's matrix under `view`.
      view: which matrix of the kernel is structured (structmat.structures.convolution): `channel`, `spatial`, `decoupled`.
      strides, kernel_dilation: an int, or one per axis.
      padding: `SAME`, `VALID`, `CIRCULAR` (periodic), an int, or one int or (before, after) per axis.
      use_bias, dtype, param_dtype, bias_init: as in flax.linen.Conv.
      in_axes, out_axes: logical axis names for sharding.
      gain: factor on the initial weight; 0 starts at zero.
      path: `factored` (factor convolutions, or patches), `dense` (one convolution with the materialised kernel) or
        `auto` (by measured break-even).
    """

    features: int
    kernel_size: int | Sequence[int]
    structure: Structure | str = "dense()"
    view: View = "channel"
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    in_axes: Axes = None
    out_axes: Axes = None
    gain: float = 1.0
    path: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.path not in PATHS:
            raise StructureError(f"path must be one of {', '.join(PATHS)}, got {self.path!r}")
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        axes, cin = len(window), x.shape[-1]
        if x.ndim < axes + 1:
            raise StructureError(f"conv: an input of shape {x.shape} has no {axes} spatial axes before its channels")
        bound = parse(self.structure).bind(*view_shapes(self.view, window, cin, self.features))
        check_field(bound, self.dtype)
        check_auxiliary(bound.structure, allowed=False)
        record(self.scope.path, bound, "conv", self.in_axes, self.out_axes)
        params = declare(self, bound, self.in_axes, self.out_axes, self.param_dtype, self.gain)
        dtype = compute_dtype(self.dtype, x, params)
        params = cast(params, dtype)

        batch, space = x.shape[: -axes - 1], x.shape[-axes - 1 : -1]
        x, geometry = self._place(x.reshape(-1, *space, cin).astype(dtype), window)
        path = self.path
        if path == "auto":
            rows = x.shape[0] * math.prod(geometry.out(x.shape[1:-1]))
            path = choose_path(bound, rows)[0] if has_factors(bound, self.view) else "dense"
        product = convolve_factored if path == "factored" else convolve_dense
        y = product(bound, params, x, geometry, self.view)
        if self.has_variable(PROBE, "weight"):
            weight = self.get_variable(PROBE, "weight").astype(dtype)
            y = y + convolve(x, kernel_of(weight, self.view, window, cin, self.features), geometry)
        if self.use_bias:
            init = nn.with_logical_partitioning(self.bias_init, (_last(self.out_axes),))
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(y.dtype)
        return y.reshape(*batch, *y.shape[1:])

    def _place(self, x: jax.Array, window: Shape) -> tuple[jax.Array, Geometry]:
        """x, wrapped around where padding is circular, and the geometry on it."""
        axes, space = len(window), x.shape[1:-1]
        strides, dilation = _each(self.strides, axes, "strides"), _each(self.kernel_dilation, axes, "kernel_dilation")
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, window)]
        padding = self.padding
        if padding == "CIRCULAR":
            around = [((r - 1) // 2, r // 2) for r in reach]
            x, padding = jnp.pad(x, ((0, 0), *around, (0, 0)), mode="wrap"), [(0, 0)] * axes
        elif isinstance(padding, str):
            if padding not in ("SAME", "VALID"):
                raise StructureError(f"conv: padding must be SAME, VALID, CIRCULAR or numbers, got {padding!r}")
            padding = lax.padtype_to_pads(space, reach, strides, padding)
        else:
            padding = [(p, p) if isinstance(p, int) else tuple(p) for p in _each(padding, axes, "padding")]
        geometry = Geometry(window, strides, dilation, tuple((int(a), int(b)) for a, b in padding))
        if min(geometry.out(x.shape[1:-1])) < 1:
            raise StructureError(f"conv: a window of {tuple(reach)} does not fit an input of {space} with {padding}")
        return x, geometry


def _each(value: Any, axes: int, what: str) -> tuple[Any, ...]:
    """One value per spatial axis."""
    out = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(out) != axes:
        raise StructureError(f"conv: {what}={value!r} must be an int or have one entry for each of {axes} spatial axes")
    return out


def _last(axes: Axes) -> str | None:
    return axes if axes is None or isinstance(axes, str) else axes[-1]
