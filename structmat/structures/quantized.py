"""Quantised: packed low-bit codes with a scale per group, the frozen half of sums such as LQ-LoRA's.

Guo et al. 2024, "LQ-LoRA", arXiv 2311.12023 (quantised plus low rank, NormalFloat levels); "GQSA", arXiv 2412.17560
(groups of consecutive weights as the unit, scales trained over frozen codes).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.descent import keep_better
from structmat.structures.errors import StructureError
from structmat.structures.factors import divisors
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, working_dtype
from structmat.structures.quantization import (
    descent_fit,
    level_table,
    nearest_codes,
    optimal_fit,
    pack,
    packed_bytes,
    unpack,
    word,
)
from structmat.structures.recipe import Structure

BITS = (2, 3, 4, 8)
EXACT_BITS = 4
"""Widest code whose optimal scales `project` looks for; its work doubles with every bit."""
CHUNK = 2**23
"""Entries `project` sorts at a time."""
SPREAD = 0.5
"""Standard deviation of the normal matrix whose rounding `init` draws, in units of the largest level."""


@dataclasses.dataclass(frozen=True, repr=False)
class Quantized(Structure):
    """`quantized(bits, group=128)`: codes of 2, 3, 4 or 8 bits and one scale per `group` consecutive entries.

    axis: groups along the contraction axis `in`, or along `out`. symmetric=False adds an offset per group. grid: evenly
    spaced integers, or `normal` for NormalFloat. Nothing trains unless `train=('scales',)` (or 'offsets') says so;
    codes never do, and are not parameters: compare by bits. `fit` chooses the bits, or the group if group=None.

    LQ-LoRA is low_rank(rank=8) + quantized(4): written the other way round, the projection starts by quantising what
    the low rank would explain, and ends further away.
    """

    bits: int | None = None
    group: int | None = 128
    axis: Literal["in", "out"] = "in"
    symmetric: bool = True
    grid: Literal["int", "normal"] = "int"
    name: ClassVar[str] = "quantized"
    about: ClassVar[About] = About(
        example="quantized(bits=4, group=64)",
        formula="scale · level[code], one scale per g entries",
        params="n m / g scales, and b bits n m",
        flops="2 n m, dequantised first",
        nearest="optimal up to 4 bits without offset, else monotone; diagonal grams",
        sharding="whole groups over both axes",
        paper="Guo et al. 2024 (LQ-LoRA)",
        when="storage; the frozen half of low_rank + quantized",
    )

    def check(self) -> None:
        self.need(group=1)
        if self.bits is not None and self.bits not in BITS:
            raise StructureError(f"quantized: bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")

    def _groups(self, in_shape: Shape, out_shape: Shape) -> list[int]:
        return divisors(math.prod(in_shape if self.axis == "in" else out_shape))

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundQuantized:
        self.required("bits", "group")
        self.choose("group", self._groups(in_shape, out_shape), in_shape, out_shape)
        return BoundQuantized(self, in_shape, out_shape)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.bits is not None and self.group is not None:
            return []
        if self.group is None and self.bits is None:
            raise StructureError("quantized: fit chooses bits or group, not both; set one of them")
        groups = self._groups(in_shape, out_shape)
        if self.group is None:
            return [dataclasses.replace(self, group=g) for g in reversed(groups)]
        self.choose("group", groups, in_shape, out_shape)
        return [dataclasses.replace(self, bits=b) for b in BITS]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundQuantized(Bound):
    """Quantised with sizes. Leaves `codes` uint8 (lines, packed bytes of a line), `scales` (lines, groups), and
    `offsets` of the same shape unless symmetric.

    A line is a column of W for axis='in' and a row for axis='out'; the groups follow the other index. Every product
    rebuilds the dense matrix (in the backward pass too, rather than keeping it), which `cost().flops_executed` says.
    """

    last: ClassVar[str] = "scales"
    grams: ClassVar[str] = "diagonal"

    @property
    def exact(self) -> bool:
        """Whether the scales found are the proven optimum."""
        return self.structure.symmetric and self.structure.bits <= EXACT_BITS

    @property
    def _inward(self) -> bool:
        return self.structure.axis == "in"

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """(lines, groups of a line, entries of a group)."""
        lines, size = (self.d_out, self.d_in) if self._inward else (self.d_in, self.d_out)
        return lines, size // self.structure.group, self.structure.group

    @property
    def _levels(self) -> tuple[float, ...]:
        return level_table(self.structure.bits, self.structure.grid)

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        lines, groups, group = self._sizes
        axes = (first_axis(out_axes), first_axis(in_axes))
        axes = axes if self._inward else axes[::-1]
        codes = (lines, packed_bytes(groups * group, self.structure.bits))
        scales = self.factor((lines, groups), axes, self.d_in, self.d_out, share=1, law="derived", decay=False)
        floats = {"scales": dataclasses.replace(scales, std=scales.std / self._level_size())}
        if not self.structure.symmetric:
            floats["offsets"] = dataclasses.replace(scales, std=0.0)
        trains = lambda name: name in (self.structure.train or ())
        return {
            "codes": Leaf(codes, axes, 1, 1, 1.0, law="index", dtype=jnp.uint8, trainable=False, decay=False),
            **{n: dataclasses.replace(leaf, trainable=trains(n)) for n, leaf in floats.items()},
        }

    def _level_size(self) -> float:
        """RMS of the levels nearest to normal numbers of standard deviation SPREAD times the largest."""
        levels = self._levels
        below = statistics.NormalDist(0, SPREAD * levels[-1]).cdf
        edges = [0.0, *(below((a + b) / 2) for a, b in itertools.pairwise(levels)), 1.0]
        return math.sqrt(sum((b - a) * v * v for (a, b), v in zip(itertools.pairwise(edges), levels)))

    def _sample(self, name: str, leaf: Leaf, key: jax.Array, dtype: Any) -> jax.Array:
        if name == "codes":
            lines, groups, group = self._sizes
            drawn = jax.random.normal(key, (lines, groups * group), jnp.float32) * (SPREAD * self._levels[-1])
            return pack(nearest_codes(drawn, self._levels), self.structure.bits)
        return jnp.full(leaf.shape, leaf.std, dtype)

    # -- products ----------------------------------------------------------------------------------------------------

    def _values(self, codes: jax.Array, params: Params, spread: Any) -> jax.Array:
        """Entries of unpacked codes; `spread` brings the scales to their shape."""
        scales = params["scales"]
        wide = working_dtype(scales)
        if self.structure.grid == "int":
            levels = (codes + int(self._levels[0])).astype(wide)
        else:
            levels = jnp.asarray(self._levels, wide)[codes]
        values = levels * spread(scales).astype(wide)
        if not self.structure.symmetric:
            values = values + spread(params["offsets"]).astype(wide)
        return values.astype(scales.dtype)

    def materialize(self, params: Params) -> jax.Array:
        lines, groups, group = self._sizes
        codes = unpack(params["codes"], self.structure.bits)[:, : groups * group]
        values = self._values(codes.reshape(lines, groups, group), params, lambda s: s[..., None])
        flat = values.reshape(lines, -1)
        return flat.T if self._inward else flat

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda p, x: x @ self.materialize(p))(params, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda p, y: y @ self.materialize(p).T)(params, y)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        bits, (_, groups, group) = self.structure.bits, self._sizes
        if not self._inward:
            codes = unpack(params["codes"][ids], bits)[..., : groups * group]
            spread = lambda s: jnp.repeat(s[ids], group, axis=-1)
            return self._values(codes, params, spread)
        octets, count = word(bits)
        packed = params["codes"].reshape(self.d_out, -1, octets)[:, ids // count]
        codes = jnp.take_along_axis(unpack(packed, bits), (ids % count)[None, ..., None], axis=-1)[..., 0]
        return jnp.moveaxis(self._values(codes, params, lambda s: s[:, ids // group]), 0, -1)

    # -- from a dense matrix -----------------------------------------------------------------------------------------

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Up to 4 bits and without offsets the global optimum, group by group, with any diagonal grams (`optimal_fit`).

        Else least squares and nearest codes in turn from the best of several ranges: never worse than rounding to the
        range of the group, nor than `like`; no optimum is proven. Scales may be negative, as the levels reach further
        down than up. Groups of zeros get the scale 0.

        Raises:
          StructureError: a full gram, or a complex matrix.
        """
        self.check_dense(w)
        if jnp.iscomplexobj(w):
            raise StructureError("quantized: cannot project a complex matrix; project its real and imaginary parts")
        lines, groups, group = self._sizes
        for gram, size, what in ((in_gram, self.d_in, "in_gram"), (out_gram, self.d_out, "out_gram")):
            if gram is not None:
                diagonal_roots(gram, size, what, self.structure.name)
        # The gram across the lines weighs whole groups, whose fits do not depend on it.
        within = in_gram if self._inward else out_gram
        wide = working_dtype(w)
        weights = jnp.ones((groups, 1), wide)
        if within is not None:
            weights = within.astype(wide).reshape(groups, group)
            weights = jnp.where(jnp.any(weights > 0, axis=1, keepdims=True), weights, 1)
        x = (w.T if self._inward else w).astype(wide).reshape(lines, groups, group)
        floats, codes = self._fit(x, weights)
        new = {"codes": pack(codes.reshape(lines, -1), self.structure.bits)}
        new |= {name: value.astype(w.dtype) for name, value in floats.items()}
        return new if self.exact else keep_better(self, w, new, like, in_gram, out_gram)

    def _fit(self, x: jax.Array, weights: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        """Scales (and offsets) and codes of x (lines, groups, group)."""
        levels = self._levels
        if self.exact:
            batch = max(1, CHUNK // (x.shape[1] * x.shape[2] * len(levels)))
            scales, codes = lax.map(lambda line: optimal_fit(line, weights, levels), x, batch_size=batch)
            return {"scales": scales}, codes
        scales, offsets, codes = descent_fit(x, weights, levels, affine=not self.structure.symmetric)
        return {"scales": scales} | ({} if self.structure.symmetric else {"offsets": offsets}), codes

    # -- accounting --------------------------------------------------------------------------------------------------

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """As for every structure, but both paths dequantise and execute the dense product."""
        executed = self._materialize_flops() + self._flops(rows)
        return dataclasses.replace(super().cost(rows, dtype, path), flops_executed=executed)

    def _flops(self, rows: int) -> int:
        return 2 * rows * self.d_in * self.d_out

    def _materialize_flops(self) -> int:
        return self.d_in * self.d_out
