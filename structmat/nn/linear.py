"""Dense layers and embeddings whose weight is any structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from structmat.nn.leaves import cast, compute_dtype, declare, embed_scale
from structmat.nn.path import choose_path
from structmat.nn.sharded import kernel_specs, run, within_replica
from structmat.nn.sites import KINDS, Kind, record
from structmat.structures import Bound, Structure, StructureError, parse
from structmat.structures.composite import Composite
from structmat.structures.leaf import Axes

PATHS = ("auto", "factored", "dense")
AUXILIARY = "auxiliary"
"""Collection of what structures add to the loss, summed by training; f32 () `loss` of each site that has such a term."""
PROBE = "probe"
"""Collection of dense `weight` (d_in, d_out) added to a site's matrix where present; the loss's gradient at zero is its
gradient by the materialised matrix."""


class StructuredDenseGeneral(nn.Module):
    """A linear map over one or several axes: x `(..., *in)` -> `(..., *features)`.

    Attributes:
      features: output size, or one per output dimension.
      structure: recipe or its text; the weight of the flattened (in, out) matrix.
      axis: input axis or axes contracted; they must be the last ones.
      use_bias, dtype, param_dtype, bias_init: as in flax.linen.Dense.
      in_axes, out_axes: logical axis names for sharding.
      kind: what rules see: `linear` or `head`.
      gain: factor on the initial weight; 0 starts at zero (residual branches, heads).
      path: `factored`, `dense` (materialise first) or `auto` (by measured break-even).
    """

    features: int | Sequence[int]
    structure: Structure | str = "dense()"
    axis: int | Sequence[int] = -1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    in_axes: Axes = None
    out_axes: Axes = None
    kind: Kind = "linear"
    gain: float = 1.0
    path: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.path not in PATHS:
            raise StructureError(f"path must be one of {', '.join(PATHS)}, got {self.path!r}")
        if self.kind not in KINDS:
            raise StructureError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        within = all(-x.ndim <= a < x.ndim for a in axes)
        axes = tuple(sorted(a % x.ndim for a in axes))
        if not within or axes != tuple(range(x.ndim - len(axes), x.ndim)):
            raise StructureError(f"axis={self.axis} must name the last axes of an input of shape {x.shape}")
        in_shape = x.shape[axes[0] :]
        bound = parse(self.structure).bind(in_shape, features)
        check_field(bound, self.dtype)
        check_auxiliary(bound.structure)
        record(self.path_names, bound, self.kind, self.in_axes, self.out_axes)
        params = declare(self, bound, self.in_axes, self.out_axes, self.param_dtype, self.gain)
        dtype = compute_dtype(self.dtype, x, params)
        batch = x.shape[: axes[0]]
        x = x.reshape(*batch, bound.d_in).astype(dtype)
        params = cast(params, dtype)
        y = product(bound, params, x, self.path, self.in_axes, self.out_axes)
        if not self.is_initializing() and (extra := bound.auxiliary(params, x)) is not None:
            self.sow(AUXILIARY, "loss", extra)
        if self.has_variable(PROBE, "weight"):
            y = y + x @ self.get_variable(PROBE, "weight").astype(dtype)
        y = y.reshape(*batch, *features)
        if self.use_bias:
            out_axes = self.out_axes if isinstance(self.out_axes, tuple) else (self.out_axes,) * len(features)
            init = nn.with_logical_partitioning(self.bias_init, out_axes)
            y = y + self.param("bias", init, features, self.param_dtype).astype(y.dtype)
        return y

    @property
    def path_names(self) -> tuple[str, ...]:
        """Names from the root module to this one."""
        return self.scope.path


def check_auxiliary(structure: Structure, allowed: bool = True) -> None:
    """Refuse a structure whose auxiliary term would be lost: in no linear layer, or within a structure that drops it."""
    if isinstance(structure, Composite) and structure.adds_auxiliary:
        for part in structure.parts():
            check_auxiliary(part, allowed)
    elif (structure.has_auxiliary and not allowed) or _inside(structure):
        raise StructureError(
            f"{structure.short()}: what it adds to the loss has no place here, only as the weight of a linear layer, as a "
            "term of a sum, in weight_norm or in fake_quantized; balance=0.0 leaves it out"
        )


def _inside(structure: Structure) -> bool:
    parts = structure.parts() if isinstance(structure, Composite) else ()
    return any(part.has_auxiliary or _inside(part) for part in parts)


def check_field(bound: Bound, dtype: Any) -> None:
    """Refuse a complex matrix in a real module, where it would turn every later activation complex."""
    if bound.is_complex and (dtype is None or not jnp.issubdtype(dtype, jnp.complexfloating)):
        raise StructureError(
            f"{bound.structure.short()} is complex: give the module dtype=jnp.complex64 and take what you need of its "
            f"output (y.real), or use a real transform such as dct() or hadamard(); got dtype={dtype}"
        )


class StructuredDense(StructuredDenseGeneral):
    """As `flax.linen.Dense`, with a `structure`: x `(..., in)` -> `(..., features)`.

    Parameter names and call are Flax's; `init` of the structure takes the place of `kernel_init`.

    Examples:
      >>> layer, x = StructuredDense(32, structure="frozen(dense()) + low_rank(rank=4)"), jnp.ones((3, 64))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape
      (3, 32)
      >>> {name: jax.tree.map(jnp.shape, nn.meta.unbox(variables[name])) for name in ("params", "frozen")}
      {'params': {'1': {'a': (4, 64), 'b': (4, 32)}, 'bias': (32,)}, 'frozen': {'0': {'kernel': (64, 32)}}}
    """


def product(
    bound: Bound, params: Any, x: jax.Array, path: str = "auto", in_axes: Axes = None, out_axes: Axes = None
) -> jax.Array:
    """x `(..., d_in)` -> `(..., d_out)` by the path named, or the one `choose_path` names; by kernels under a mesh too."""
    specs, kernel = (None, None) if path == "dense" else kernel_specs(bound, params, x, in_axes, out_axes)
    if path == "auto":
        path, _ = choose_path(bound, math.prod(x.shape[:-1]), kernel)
    params = within_replica(bound, params, in_axes, out_axes)
    if path == "factored":
        return run(bound, params, x, specs)
    w = bound.materialize(params)
    return x @ (w if bound.is_complex else w.astype(x.dtype))  # a transform without leaves has no dtype of its own


class StructuredEmbed(nn.Module):
    """As `flax.linen.Embed`, with a `structure` on the (num_embeddings, features) table.

    At initialisation rows have RMS 1 for dense and factorised families and their sums; sparse and block-diagonal tables
    keep only their density of it, and transposed, product and `paper` ones their own size. `attend` is the tied head.

    Examples:
      >>> embed, ids = StructuredEmbed(256, 64, structure="kronecker(terms=2)"), jnp.arange(10)
      >>> embed.apply(embed.init(jax.random.key(0), ids), ids).shape
      (10, 64)
    """

    num_embeddings: int
    features: int
    structure: Structure | str = "dense()"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    in_axes: Axes = "vocab"
    out_axes: Axes = "embed"

    def setup(self) -> None:
        self.bound = parse(self.structure).bind(self.num_embeddings, self.features)
        check_field(self.bound, self.dtype)
        check_auxiliary(self.bound.structure, allowed=False)
        record(self.scope.path, self.bound, "embed", self.in_axes, self.out_axes)
        self.table = declare(self, self.bound, self.in_axes, self.out_axes, self.param_dtype, rescale=embed_scale)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids `(...)` integer -> `(..., features)`."""
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise StructureError(f"embedding ids must be integers, got {ids.dtype}")
        dtype = compute_dtype(self.dtype, jnp.zeros((), self.param_dtype), self.table)
        table = within_replica(self.bound, cast(self.table, dtype), self.in_axes, self.out_axes)
        rows = self.bound.take(table, ids).astype(dtype)
        if self.has_variable(PROBE, "weight"):
            rows = rows + self.get_variable(PROBE, "weight").astype(dtype)[ids]
        return rows

    def attend(self, x: jax.Array) -> jax.Array:
        """x `(..., features)` -> logits `(..., num_embeddings)`."""
        dtype = compute_dtype(self.dtype, x, self.table)
        table = within_replica(self.bound, cast(self.table, dtype), self.in_axes, self.out_axes)
        logits = self.bound.rmatmul(table, x.astype(dtype))
        if self.has_variable(PROBE, "weight"):
            logits = logits + x.astype(dtype) @ self.get_variable(PROBE, "weight").astype(dtype).T
        return logits
