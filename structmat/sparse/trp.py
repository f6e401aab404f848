"""Trained rank pruning: dense weights that train near low rank, so that a factorisation at the end costs little.

Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402 and 2004.14566. Every `every` steps
each matrix W = U diag(s) V^T becomes U_k diag(s_k) V_k^T, k the smallest count that holds `energy` of the squares of s; on
the step after it nuclear * U_k V_k^T, a sub-gradient of the nuclear norm there, is added to the gradient by W.

As in the authors' code the optimiser's moments stay as they are, and the sub-gradient passes through the optimiser. No
gradient passes through an SVD. Truncating again may lower a rank further, for `energy` is a share of what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from structmat.nn import Site, leaf_groups
from structmat.nn.method import Method, Penalty
from structmat.nn.sites import array_path
from structmat.sparse.masks import get, put
from structmat.structures import StructureError
from structmat.structures.convolution import view_of
from structmat.structures.dense import BoundDense
from structmat.structures.linalg import working_dtype
from structmat.structures.rules import matching


@dataclasses.dataclass(frozen=True, repr=False)
class TRP(Method):
    """`trp(every=5, energy=0.9, nuclear=0.0003, only='.*')`.

    It acts on the trainable dense weights of sites of kind `linear` and of convolutions of more than 1 x 1, among those
    whose layer path `only` matches in full. The matrix of a convolution is the one its `view` names, so that a switch to
    low_rank at the end meets what was truncated: `channel` and `spatial` are the paper's schemes of those names, and
    under `decoupled` each output channel has a matrix (cin, window) of its own, as in block_low_rank(1, cout, rank).

    `energy=1` truncates nothing and leaves the nuclear norm alone; `nuclear=0` the truncation alone.
    """

    every: int = 5
    energy: float = 0.9
    nuclear: float = 3e-4
    only: str = ".*"
    name: ClassVar[str] = "trp"

    def check(self) -> None:
        self.need(every=1)
        if not 0 < self.energy <= 1:
            raise StructureError(f"{self.name}: energy must be in (0, 1], got {self.energy}")
        if self.nuclear < 0:
            raise StructureError(f"{self.name}: nuclear must not be negative, got {self.nuclear}")
        if self.energy == 1 and self.nuclear == 0:
            raise StructureError(f"{self.name}: energy=1.0 with nuclear=0.0 changes nothing; lower energy, such as 0.9")

    def rule(self, sites: Mapping[str, Site], steps: int) -> Truncate | None:
        kernels = self._kernels(sites, steps)
        return Truncate(kernels, self.every, self.energy) if self.energy < 1 else None

    def penalty(self, sites: Mapping[str, Site], steps: int) -> Penalty | None:
        """nuclear * sum <W, U_k V_k^T> on the steps right after a truncation, 0 on the others."""
        kernels = self._kernels(sites, steps)
        if not self.nuclear:
            return None

        def value(variables: Mapping[str, Any], step: jax.Array) -> jax.Array:
            weights = [get(variables["params"], kernel.weight) for kernel in kernels]
            fixed = jax.lax.stop_gradient(weights)
            zeros = lambda held: [jnp.zeros_like(w) for w in held]
            polar = lambda held: [on_matrices(polar_factor, w, k.blocks) for w, k in zip(held, kernels)]
            due = (step > 0) & (step % self.every == 0)
            found = jax.lax.stop_gradient(jax.lax.cond(due, polar, zeros, fixed))
            return self.nuclear * sum(jnp.sum((w * p).astype(jnp.float32)) for w, p in zip(weights, found))

        return value

    def report(self, sites: Mapping[str, Site], variables: Mapping[str, Any]) -> dict[str, Any]:
        """`ranks`: site -> the smallest rank, on average over the matrices of a convolution, that holds `energy` (99.9% where
        that is 1)."""
        energy = self.energy if self.energy < 1 else 0.999
        ranks: dict[str, float] = {}
        for kernel in find_kernels(sites, self.name, self.only):
            counts = _rank(apart(get(variables["params"], kernel.weight), kernel.blocks), energy)
            layers = [p for p, site in sites.items() if array_path(p, site) == kernel.place]
            means = jax.device_get(jnp.mean(counts.reshape(len(layers), -1), axis=1))
            ranks |= dict(zip(layers, means.astype(float).tolist()))
        return {"ranks": ranks, "energy": energy}

    def _kernels(self, sites: Mapping[str, Site], steps: int) -> tuple[Kernel, ...]:
        if self.every >= steps:
            raise StructureError(
                f"{self.name}: every={self.every} must be below the {steps} steps of the run, such as {max(1, steps // 10)}"
            )
        return find_kernels(sites, self.name, self.only)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The array of one dense weight, (d_in, d_out), or with a leading axis over the layers of a scanned group.

    Attributes:
      place: path of the site's arrays among the parameters. blocks: of columns, each of which is a matrix of its own.
    """

    place: tuple[str, ...]
    blocks: int

    @property
    def weight(self) -> tuple[str, ...]:
        """Path of the array."""
        return (*self.place, "kernel")


@dataclasses.dataclass(frozen=True)
class Truncate:
    """The Rule: keeps no state.

    Attributes:
      kernels: which. every, energy: as in the method.
    """

    kernels: tuple[Kernel, ...]
    every: int
    energy: float
    needs_dense_gradients: ClassVar[bool] = False

    def init(self, sites: Mapping[str, Site], state: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def due(self, step: jax.Array) -> jax.Array:
        """Every `every` steps."""
        return step % self.every == 0

    def update(self, key: jax.Array, step: jax.Array, dense_grads: Mapping[str, jax.Array], state: Any) -> Any:
        """Every kernel truncated; all else, moments included, as it was."""
        params = state.params
        for kernel in self.kernels:
            one = lambda w: truncate(w, self.energy)
            params = put(params, kernel.weight, on_matrices(one, get(params, kernel.weight), kernel.blocks))
        return state.replace(params=params)


def find_kernels(sites: Mapping[str, Site], name: str, only: str = ".*") -> tuple[Kernel, ...]:
    """The weights the method `name` acts on.

    Args:
      only: regular expression that the layer paths must match in full.

    Raises:
      StructureError: there are none; `only` is no regular expression; or it picks some layers of a scanned group.
    """
    blocks = {path: own for path, site in sites.items() if (own := _blocks(site))}
    if not blocks:
        there = dict.fromkeys(f"{site.kind} {site.bound.structure.short()}" for site in sites.values())
        raise StructureError(
            f"{name} truncates dense() weights of kind linear, and of kind conv with a window of more than 1 x 1; this "
            f"model has none; its sites: {', '.join(there)}"
        )
    try:
        chosen = set(matching(only, blocks))
    except StructureError as error:
        raise StructureError(f"{name}: only={error}") from None
    found = []
    for place, (path, _) in leaf_groups(sites).items():
        layers = {p for p, site in sites.items() if array_path(p, site) == place}
        if layers <= chosen:
            found.append(Kernel(place, blocks[path]))
        elif own := sorted(layers & chosen):
            raise StructureError(
                f"{name}: only={only!r} picks {own[0]} and not {min(layers - chosen)}, which is stacked with it; "
                "model.scan=False keeps layers apart"
            )
    return tuple(found)


def _blocks(site: Site) -> int:
    """Matrices side by side in a site's weight; 0 where nothing acts on it."""
    if not isinstance(site.bound, BoundDense) or not site.bound.leaves()["kernel"].trainable:
        return 0
    if site.kind == "linear":
        return 1
    viewed = view_of(site.bound.in_shape, site.bound.out_shape) if site.kind == "conv" else None
    if viewed is None or math.prod(viewed[1]) == 1:
        return 0
    return site.bound.out_shape[0] if viewed[0] == "decoupled" else 1


def on_matrices(fn: Any, w: jax.Array, blocks: int) -> jax.Array:
    """`fn` of (..., m, n) on each of `blocks` runs of columns of w (..., m, blocks n), in the same places."""
    return fn(apart(w, blocks)).swapaxes(-3, -2).reshape(w.shape).astype(w.dtype)


def apart(w: jax.Array, blocks: int) -> jax.Array:
    """(..., blocks, m, n): those runs of columns."""
    return w.reshape(*w.shape[:-1], blocks, -1).swapaxes(-3, -2)


def kept(s: jax.Array, energy: float) -> jax.Array:
    """bool, of the shape of s (..., r) descending: the k largest, k the smallest count with at least `energy` of sum s^2."""
    squares = jnp.square(s)
    before = jnp.cumsum(squares, -1) - squares
    return before < energy * squares.sum(-1, keepdims=True)


def _rank(w: jax.Array, energy: float) -> jax.Array:
    """f32 (...): how many singular values of w (..., m, n) hold `energy`."""
    s = jnp.linalg.svd(w.astype(working_dtype(w)), compute_uv=False)
    return kept(s, energy).sum(-1).astype(jnp.float32)


def truncate(w: jax.Array, energy: float) -> jax.Array:
    """w (..., m, n) at the lowest rank that holds `energy` of |w|^2; |w - truncated|^2 <= (1 - energy) |w|^2."""
    u, s, vt = jnp.linalg.svd(w.astype(working_dtype(w)), full_matrices=False)
    return _product(u * jnp.where(kept(s, energy), s, 0)[..., None, :], vt)


def polar_factor(w: jax.Array) -> jax.Array:
    """U_k V_k^T of w (..., m, n), k its numerical rank: a sub-gradient of its nuclear norm."""
    u, s, vt = jnp.linalg.svd(w.astype(working_dtype(w)), full_matrices=False)
    least = max(w.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
    return _product(u * (s > least)[..., None, :], vt)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")
