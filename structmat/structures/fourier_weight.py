"""Weights of Fourier layers: complex tensors W[in, out, k_1 ... k_d], one matrix per frequency, in the N-d formats.

Kossaifi et al. 2023 ("Multi-Grid Tensorized Fourier Neural Operator"). The recipes are those of matrices: dense(),
tucker(rank), cp(rank), tensor_train(rank) and `fit` of one; every axis of W is one axis of the tensor.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum

from structmat.structures.base import Bound
from structmat.structures.cp import CP
from structmat.structures.cp_format import CPFormat
from structmat.structures.dense import Dense
from structmat.structures.descent import keep_better
from structmat.structures.errors import StructureError
from structmat.structures.fit import Fit
from structmat.structures.leaf import Axes, Cost, Leaf, Leaves, Params, Shape, count_params, first_axis
from structmat.structures.recipe import Structure, as_shape
from structmat.structures.tensor import TensorFormat, TensorTrainFormat, maximal_ranks
from structmat.structures.tensor_train import TensorTrain
from structmat.structures.tucker import Tucker
from structmat.structures.tucker_format import TuckerFormat, proportional_ranks, useful_ranks

COMPLEX = 4
"""Real multiply-adds in a complex one."""


def bind_fourier_weight(structure: Structure, in_shape: int | Shape, out_shape: Shape) -> BoundFourierWeight:
    """The weight of a Fourier layer from `in_shape` = (cin,) channels to `out_shape` = (cout, *modes).

    Tucker and CP keep every axis whole (`modes=1`), a tensor train has one core per axis: the Bound's structure says so.
    `fit` takes the largest member within the fraction of the dense tensor; Tucker ranks grow in proportion to their axes.

    Raises:
      StructureError: sides of another form, a structure that is none of the four, or ranks that do not fit.
    """
    in_shape, out_shape = (
        as_shape(in_shape, "fourier weight: in_shape"),
        as_shape(out_shape, "fourier weight: out_shape"),
    )
    if len(in_shape) != 1 or len(out_shape) < 2:
        raise StructureError(
            f"a fourier weight joins (cin,) to (cout, *modes), got {in_shape} and {out_shape}; one mode count per axis"
        )
    axes = in_shape + out_shape
    if isinstance(structure, Fit):
        structure = _fitted(structure, axes)
    structure = _whole_axes(structure, axes)
    return BoundFourierWeight(structure, in_shape, out_shape, _format(structure, axes))


def _whole_axes(structure: Structure, axes: Shape) -> Structure:
    """The recipe with one factor or core per axis of the tensor."""
    if isinstance(structure, Tucker | CP):
        return dataclasses.replace(structure, modes=1)
    if isinstance(structure, TensorTrain):
        return dataclasses.replace(structure, cores=len(axes))
    if isinstance(structure, Dense):
        return structure
    raise StructureError(
        f"{structure.short()} is no weight of a Fourier layer; dense(), tucker(rank), cp(rank), tensor_train(rank) and fit "
        "of one are"
    )


def _format(structure: Structure, axes: Shape) -> TensorFormat | None:
    if isinstance(structure, Dense):
        return None
    structure.required("rank")
    if isinstance(structure, CP):
        return CPFormat.of(axes, structure.rank)
    if isinstance(structure, Tucker):
        if isinstance(structure.rank, int):
            structure.choose("rank", range(1, max(useful_ranks(axes, axes)) + 1), axes[:1], axes[1:])
        return TuckerFormat.of(axes, structure.rank)
    most = max(maximal_ranks([(n,) for n in axes]))
    structure.choose("rank", range(1, most + 1), axes[:1], axes[1:])
    return TensorTrainFormat.of(axes, structure.rank)


def _fitted(fit: Fit, axes: Shape) -> Structure:
    """The largest member of `fit.a` within its budget."""
    metric, fraction = fit.budget
    bound = lambda s: BoundFourierWeight(s, axes[:1], axes[1:], _format(s, axes))
    cost = lambda s: getattr(bound(s).cost(1), metric)
    free, dense = _whole_axes(fit.a, axes), cost(Dense())
    if isinstance(free, Dense) or free.rank is not None:
        raise StructureError(
            f"fit: {fit.a.short()} leaves nothing to choose for a fourier weight {axes}; leave rank unset"
        )
    if isinstance(free, Tucker):
        ranks = proportional_ranks(axes)
    elif isinstance(free, TensorTrain):
        ranks = range(1, max(maximal_ranks([(n,) for n in axes])) + 1)
    else:
        ranks = range(1, min(math.prod(axes) // max(axes), max(1, math.prod(axes) // sum(axes))) + 1)
    at = bisect.bisect_right(ranks, fraction * dense, key=lambda r: cost(dataclasses.replace(free, rank=r))) - 1
    if at < 0:
        least = cost(dataclasses.replace(free, rank=ranks[0])) / dense
        raise StructureError(
            f"fit: {metric}={fraction} is less than the smallest {free.name} of a fourier weight {axes}, {least:.4g} of dense"
        )
    return dataclasses.replace(free, rank=ranks[at])


@dataclasses.dataclass(frozen=True, repr=False)
class BoundFourierWeight(Bound):
    """A complex64 tensor (cin, cout, *modes) with sizes; as a matrix (cin, cout * prod(modes)).

    Leaves: `kernel` (cin, cout, *modes) of dense; `factor0` (cin, R), `factor1` (cout, R), one more per mode axis and, of
    tucker, `core`; `core0` ... of a tensor train. Entries W have E|W|^2 = 2 / (cin + cout) at initialisation, under every
    `init`, all leaves of a format one standard deviation. A learning-rate fan is that of the leaf in the chain from
    channels and frequencies (both one-hot in their axis) to the output.

    What it multiplies is `contract`; `matmul` is the product with the matrix, for those who compare matrices.
    """

    format: TensorFormat | None

    def rebind(self, structure: Structure) -> BoundFourierWeight:
        """As `bind_fourier_weight`."""
        return bind_fourier_weight(structure, self.in_shape, self.out_shape)

    @property
    def axes(self) -> Shape:
        """Of the tensor: (cin, cout, *modes)."""
        return self.in_shape + self.out_shape

    @property
    def modes(self) -> Shape:
        """Frequencies kept along every axis."""
        return self.out_shape[1:]

    @property
    def may_densify(self) -> bool:
        """`contract` forms the tensor by itself where that is the cheapest order."""
        return False

    @property
    def exact(self) -> bool:
        """Only the dense tensor is its own projection."""
        return self.format is None

    @property
    def names(self) -> list[str]:
        """Of the leaves, in the order of the format's cores."""
        if self.format is None:
            return ["kernel"]
        if isinstance(self.format, TensorTrainFormat):
            return [f"core{k}" for k in range(len(self.axes))]
        factors = [f"factor{k}" for k in range(len(self.axes))]
        return ["core", *factors] if isinstance(self.format, TuckerFormat) else factors

    @property
    def last(self) -> str:
        """The leaf that holds the output channels."""
        return "kernel" if self.format is None else self.names[-len(self.axes) + 1]

    @property
    def std(self) -> float:
        """sqrt(E|W|^2) at initialisation (`spectral_convolution.py` of the authors' library)."""
        return math.sqrt(2 / (self.axes[0] + self.axes[1]))

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        sides = (first_axis(in_axes), first_axis(out_axes), *(None,) * len(self.modes))
        make = lambda shape, axes, fan_in, fan_out, std, share: Leaf(
            shape, axes, fan_in, fan_out, std, dtype=jnp.complex64, share=share, mode=self.structure.init
        )
        if self.format is None:
            return {"kernel": make(self.axes, sides, *self.axes[:2], self.std, 1)}
        shapes = self.format.core_shapes
        std = (self.std / math.sqrt(self.format.products)) ** (1 / len(shapes))
        rows = zip(self.names, shapes, self._placed(sides), self._fans(), strict=True)
        return {name: make(shape, axes, *fans, std, len(shapes)) for name, shape, axes, fans in rows}

    def _placed(self, sides: tuple[str | None, ...]) -> list[tuple[str | None, ...]]:
        """Logical axes of every core: channels as the site names them, ranks and modes none."""
        if isinstance(self.format, TensorTrainFormat):
            return [(None, side, None) for side in sides]
        factors: list[tuple[str | None, ...]] = [(side, None) for side in sides]
        return [(None,) * len(sides), *factors] if isinstance(self.format, TuckerFormat) else factors

    def _fans(self) -> list[tuple[int, int]]:
        """(fan_in, fan_out) of every core: what one output of it sums over, and what one input reaches."""
        cin, cout, *modes = self.axes
        if isinstance(self.format, CPFormat):
            rank = self.format.rank
            return [(cin, rank), (rank, cout), *((1, 1) for _ in modes)]
        if isinstance(self.format, TuckerFormat):
            first, second, *rest = self.format.ranks
            return [(first * math.prod(rest), second), (cin, first), (second, cout), *((1, r) for r in rest)]
        ranks = (*self.format.ranks, 1)
        last = [(right, left) for left, right in itertools.pairwise(ranks[1:])]
        return [(cin, ranks[0]), (ranks[0] * ranks[1], cout), *last]

    # -- products ----------------------------------------------------------------------------------------------------

    def _cores(self, params: Params) -> list[jax.Array]:
        return [params[name] for name in self.names]

    @property
    def _subscripts(self) -> tuple[str, str, str]:
        """Of the spectrum, the tensor and the result."""
        modes = "".join(chr(ord("p") + k) for k in range(len(self.modes)))
        return f"b{modes}i", f"io{modes}", f"b{modes}o"

    def contract(self, params: Params, spectrum: jax.Array) -> jax.Array:
        """Every frequency times its own matrix: complex (batch, *modes, cin) -> (batch, *modes, cout).

        Core by core in the order of fewest operations, the dense tensor formed only where that is it.

        Raises:
          StructureError: a spectrum of other modes or channels.
        """
        if spectrum.shape[1:] != (*self.modes, self.axes[0]):
            raise StructureError(
                f"fourier weight: a spectrum of shape {spectrum.shape}; expected (batch, {', '.join(map(str, self.modes))}, "
                f"{self.axes[0]})"
            )
        left, tensor, out = self._subscripts
        if self.format is None:
            return jnp.einsum(f"{left},{tensor}->{out}", spectrum, params["kernel"])
        return self.format.contract(self._cores(params), spectrum, f"{left},{tensor}->{out}")

    def tensor(self, params: Params) -> jax.Array:
        """The complex tensor (cin, cout, *modes)."""
        return params["kernel"] if self.format is None else self.format.materialize(self._cores(params))

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return x @ self.materialize(params)

    def materialize(self, params: Params) -> jax.Array:
        return self.tensor(params).reshape(self.d_in, self.d_out)

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """As the format does it (HOOI, alternating least squares, TT-SVD) from the complex (cin, cout * prod(modes)) matrix;
        never worse than `like`."""
        self.check_dense(w)
        self.no_gram(in_gram, out_gram)
        tensor = jnp.asarray(w, jnp.promote_types(w.dtype, jnp.complex64)).reshape(self.axes)
        if self.format is None:
            return {"kernel": tensor}
        start = {} if like is None or isinstance(self.format, TensorTrainFormat) else {"like": self._cores(like)}
        start |= {"key": key} if isinstance(self.format, CPFormat) else {}
        params = dict(zip(self.names, self.format.project(tensor, **start), strict=True))
        return keep_better(self, tensor.reshape(w.shape), params, like)

    # -- accounting --------------------------------------------------------------------------------------------------

    def _flops(self, rows: int) -> int:
        """Of `contract` with `rows` spectra, in the order it takes."""
        left, tensor, out = self._subscripts
        sizes = dict(zip(tensor, self.axes)) | {"b": rows}
        x = tuple(sizes[c] for c in left)
        if self.format is None:
            return COMPLEX * _operations(f"{left},{tensor}->{out}", (x, self.axes))
        free = "".join(c for c in "ABCDEFGHJKLM")
        cores = ",".join(self.format._names(tensor, free))
        return COMPLEX * _operations(f"{left},{cores}->{out}", (x, *self.format.core_shapes))

    def _materialize_flops(self) -> int:
        return 0 if self.format is None else COMPLEX * self.format.materialize_flops()

    def cost(self, rows: int, dtype: Any = jnp.float32, path: str = "factored") -> Cost:
        """Of `contract` with `rows` spectra (one per sample or patch): 8 FLOPs per complex multiply-add, spectra in
        complex64. The transforms are not in it."""
        if path not in ("factored", "dense"):
            raise StructureError(f"cost: path must be 'factored' or 'dense', got {path!r}")
        flat = list(self.leaves().values())
        points = math.prod(self.modes)
        flops, bits = self._flops(rows), sum(leaf.bits() for leaf in flat)
        dense = self._materialize_flops() + 2 * COMPLEX * rows * self.d_in * self.d_out
        return Cost(
            params=sum(count_params(leaf) for leaf in flat),
            bits=bits,
            flops=flops,
            flops_executed=flops if path == "factored" else dense,
            bytes=bits // 8 + rows * points * sum(self.axes[:2]) * jnp.dtype(jnp.complex64).itemsize,
        )


@functools.lru_cache(maxsize=4096)
def _operations(subscripts: str, shapes: Sequence[Shape]) -> int:
    """FLOPs of `jnp.einsum(..., optimize="auto-hq")` on real operands, 2 per multiply-add and 1 per lone product."""
    return int(opt_einsum.contract_path(subscripts, *shapes, shapes=True, optimize="auto-hq")[1].opt_cost)
