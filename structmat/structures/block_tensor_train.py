"""Block tensor train (Qiu et al. 2024, arXiv 2406.06248): a chain of batched dense maps that share no parameter.

With d_in = m_1 ... m_c and d_out = n_1 ... n_c the matrix is
W[i, j] = sum_a prod_k G_k[j_1..j_(k-1), i_c..i_(k+1), (a_(k-1), i_k), (a_k, j_k)], a_0 = a_c = 0.

In index: digits i_c, ..., i_1, the last (i_1) fastest. Out index: j_1, ..., j_c with j_c fastest (`blocked`) or
j_c, ..., j_1 with j_1 fastest (`paper`). For two cores that is the block-low-rank class with k = i_2, p = i_1,
l = j_1, s = j_2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from structmat.structures.about import About
from structmat.structures.base import Bound
from structmat.structures.block_low_rank import BoundBlockLowRank, Order
from structmat.structures.descent import keep_better
from structmat.structures.factors import divisors, need_factors
from structmat.structures.leaf import Axes, Leaves, Params, Shape, first_axis
from structmat.structures.linalg import diagonal_roots, truncated_svd
from structmat.structures.recipe import Structure


def _blocks(size: int) -> int:
    """The largest divisor <= sqrt(size)."""
    return max(q for q in divisors(size) if q * q <= size)


def cut_ranks(ins: Shape, outs: Shape) -> list[int]:
    """Full rank of the slices at each of the c - 1 cuts: min(m_1..m_k, n_(k+1)..n_c)."""
    return [min(math.prod(ins[:k]), math.prod(outs[k:])) for k in range(1, len(ins))]


@dataclasses.dataclass(frozen=True, repr=False)
class BlockTensorTrain(Structure):
    """`block_tensor_train(rank, cores=2, order='paper')`: no sharing, so FLOPs per row are twice the parameters.

    Square d, two cores: 2 rank d^1.5 parameters; rank sqrt(d) is every matrix. Two cores resolve to the block-low-rank
    class (leaves R and L) with the largest divisor <= sqrt(d) of each side as its blocks; a prime side is one block.
    Three or more cores have leaves `core0`, `core1`, ... and the most even factors of each side, the larger ones where
    the chain starts (in) and ends (out).

    Every bond has size `rank`, except where a cut's slices are smaller: there it is their full rank.
    """

    rank: int | None = None
    cores: int = 2
    order: Order = "paper"
    name: ClassVar[str] = "block_tensor_train"
    about: ClassVar[About] = About(
        example="block_tensor_train(rank=2)",
        formula="√n × √m slices of rank r",
        params="r (√m n + √n m)",
        flops="2 × parameters",
        nearest="optimal (2 cores, diagonal grams), else within √(cores-1)",
        sharding="as block_low_rank; order='paper' adds an all-to-all",
        paper="Qiu et al. 2024",
        when="as Monarch, with a free rank",
        kernel="monarch",
    )

    def check(self) -> None:
        self.need(rank=1, cores=2)

    def _factors(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, Shape]:
        """(m_1..m_c) descending and (n_1..n_c) ascending."""
        n, m, c = math.prod(in_shape), math.prod(out_shape), self.cores
        if c == 2:
            return (n // _blocks(n), _blocks(n)), (_blocks(m), m // _blocks(m))
        return need_factors(n, c, self.name, "in size"), need_factors(m, c, self.name, "out size")[::-1]

    def _ranks(self, in_shape: Shape, out_shape: Shape) -> list[int]:
        return list(range(1, max(cut_ranks(*self._factors(in_shape, out_shape))) + 1))

    def _bind(self, in_shape: Shape, out_shape: Shape) -> Bound:
        self.required("rank")
        self.choose("rank", self._ranks(in_shape, out_shape), in_shape, out_shape)
        ins, outs = self._factors(in_shape, out_shape)
        if self.cores == 2:
            return BoundBlockLowRank(self, in_shape, out_shape, ins[1], outs[0], self.rank, self.order)
        return BoundBlockTensorTrain(self, in_shape, out_shape, ins, outs)

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        if self.rank is not None:
            return []
        return [dataclasses.replace(self, rank=r) for r in self._ranks(in_shape, out_shape)]


@dataclasses.dataclass(frozen=True, repr=False)
class BoundBlockTensorTrain(Bound):
    """Three or more cores with sizes.

    Leaf `core{k-1}`: (n_1 ... n_(k-1), m_c ... m_(k+1), r_(k-1) m_k, r_k n_k), the two batch dimensions flattened with
    the digit that is slowest in the matrix first.
    """

    ins: Shape
    outs: Shape

    exact: ClassVar[bool] = False
    grams: ClassVar[str] = "diagonal"

    def __repr__(self) -> str:
        return f"{super().__repr__()}, in factors {self.ins}, out factors {self.outs}, ranks {self.ranks[1:-1]}"

    @property
    def last(self) -> str:
        return f"core{len(self.ins) - 1}"

    @property
    def ranks(self) -> Shape:
        """(r_0, ..., r_c) with ones at the ends."""
        return (1, *(min(self.structure.rank, full) for full in cut_ranks(self.ins, self.outs)), 1)

    def _steps(self) -> list[tuple[str, int, int, int, int, int, int]]:
        """Per core (leaf name, n_1..n_(k-1), m_(k+1)..m_c, r_(k-1), m_k, r_k, n_k)."""
        r = self.ranks
        return [
            (f"core{k}", math.prod(self.outs[:k]), math.prod(self.ins[k + 1 :]), r[k], m, r[k + 1], n)
            for k, (m, n) in enumerate(zip(self.ins, self.outs))
        ]

    def _leaves(self, in_axes: Axes, out_axes: Axes) -> Leaves:
        i, o = first_axis(in_axes), first_axis(out_axes)
        end = len(self.ins) - 1
        leaves: Leaves = {}
        for k, (name, outer, inner, r0, m, r1, n) in enumerate(self._steps()):
            axes = (o if k else None, i if k < end else None, "block_in", "block_out")
            shape = (outer, inner, r0 * m, r1 * n)
            leaves[name] = self.factor(shape, axes, r0 * m, r1 * n, share=end + 1, embed_fan=r0)
        return leaves

    def _ordered(self, y: jax.Array) -> jax.Array:
        """Out index of y `(..., d_out)` from blocked to the structure's order."""
        return y if self.structure.order == "blocked" else _reverse_digits(y, self.outs)

    def _blocked(self, y: jax.Array) -> jax.Array:
        """Inverse of `_ordered`."""
        return y if self.structure.order == "blocked" else _reverse_digits(y, self.outs[::-1])

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        z = x.reshape(-1, 1, self.d_in // self.ins[0], self.ins[0]).transpose(1, 2, 0, 3)
        for k, (name, outer, inner, _, _, r1, n) in enumerate(self._steps()):
            z = lax.dot_general(z, params[name], (((3,), (2,)), ((0, 1), (0, 1))))
            after = self.ins[k + 1] if k + 1 < len(self.ins) else 1
            z = z.reshape(outer, inner // after, after, -1, r1, n).transpose(0, 5, 1, 3, 4, 2)
            z = z.reshape(outer * n, inner // after, -1, r1 * after)
        return self._ordered(z.reshape(self.d_out, -1).T).reshape(*x.shape[:-1], self.d_out)

    def materialize(self, params: Params) -> jax.Array:
        (name, _, inner, _, m, r1, n), *steps = self._steps()
        z = params[name].reshape(inner, m, r1, n).transpose(3, 0, 1, 2)
        for name, outer, inner, r0, m, r1, n in steps:
            core = params[name].reshape(outer, inner, r0, m, r1, n)
            z = jnp.einsum("jimlr,jirmsn->jnimls", z.reshape(outer, inner, m, -1, r0), core)
            z = z.reshape(outer * n, inner, -1, r1)
        return self._ordered(z.reshape(self.d_out, self.d_in).T)

    def take(self, params: Params, ids: jax.Array) -> jax.Array:
        flat = ids.reshape(-1)
        z = jnp.ones((flat.size, 1, 1), params[self.last].dtype)
        rest = flat
        for name, outer, inner, r0, m, r1, n in self._steps():
            digit, rest = rest % m, rest // m
            core = params[name].reshape(outer, inner, r0, m, r1, n)[:, rest, :, digit]
            z = jnp.einsum("bjr,bjrsn->bjns", z, core).reshape(flat.size, outer * n, r1)
        return self._ordered(z.reshape(*ids.shape, self.d_out))

    def project(
        self,
        w: jax.Array,
        *,
        key: jax.Array | None = None,
        like: Params | None = None,
        in_gram: jax.Array | None = None,
        out_gram: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Successive slice SVD, cut after cut, as TT-SVD does: at most sqrt(cores - 1) times the smallest error.

        Each step splits off one core by the truncated SVD of every slice at its cut; left factors are orthonormal, so
        error^2 <= sum over the cuts of the discarded sigma^2 of w's own slices. Exact for members. The norm is spread
        evenly over the cores. Diagonal grams are absorbed by the outer cores; a full gram couples slices and is refused.
        """
        self.check_dense(w)
        lr, li = self._roots(in_gram, self.d_in, "in_gram")
        rr, ri = self._roots(out_gram, self.d_out, "out_gram")
        z = self._blocked(w * lr[:, None] * rr)
        cores: dict[str, jax.Array] = {}
        for name, outer, inner, r0, m, r1, n in self._steps():
            z = z.reshape(outer, inner, m, r0, n, -1).transpose(0, 4, 1, 3, 2, 5)
            core = z.reshape(outer, n, inner, r0 * m, -1)
            if name != self.last:
                core, s, vt = truncated_svd(core, r1)
                z = (s[..., None] * vt).reshape(outer * n, inner, r1, -1)
            cores[name] = core.transpose(0, 2, 3, 4, 1).reshape(outer, inner, r0 * m, r1 * n)
        cores = self._absorb(_balanced(cores), li, ri)
        new = {name: core.astype(w.dtype) for name, core in cores.items()}
        return keep_better(self, w, new, like, in_gram, out_gram)

    def _roots(self, gram: jax.Array | None, size: int, what: str) -> tuple[jax.Array, jax.Array]:
        if gram is None:
            return jnp.ones(size), jnp.ones(size)
        return diagonal_roots(gram, size, what, self.structure.name)

    def _absorb(self, cores: dict[str, jax.Array], left: jax.Array, right: jax.Array) -> dict[str, jax.Array]:
        """Undo the whitening: the first core sees every in digit, the last every out digit."""
        first, last = cores["core0"], cores[self.last]
        first = first * left.reshape(1, first.shape[1], first.shape[2], 1)
        right = self._blocked(right).reshape(last.shape[0], 1, 1, last.shape[3])
        return cores | {"core0": first, self.last: last * right}

    def _flops(self, rows: int) -> int:
        return 2 * rows * sum(outer * inner * r0 * m * r1 * n for _, outer, inner, r0, m, r1, n in self._steps())

    def _materialize_flops(self) -> int:
        return 2 * self.d_in * sum(outer * n * r0 * r1 for _, outer, _, r0, _, r1, n in self._steps()[1:])


def _reverse_digits(y: jax.Array, digits: Shape) -> jax.Array:
    """The last axis, read as `digits` slowest first, with their order reversed."""
    lead = y.ndim - 1
    split = y.reshape(*y.shape[:-1], *digits)
    return split.transpose(*range(lead), *range(split.ndim - 1, lead - 1, -1)).reshape(y.shape)


def _balanced(cores: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scale every core to the geometric mean of their norms; zero cores are left alone."""
    norms = {name: jnp.linalg.norm(core) for name, core in cores.items()}
    logs = [jnp.log(jnp.where(n > 0, n, 1)) for n in norms.values()]
    mean = jnp.exp(sum(logs) / len(logs))
    zero = jnp.any(jnp.stack(list(norms.values())) == 0)
    return {
        name: core * jnp.where(zero, 1, mean / jnp.where(norms[name] > 0, norms[name], 1))
        for name, core in cores.items()
    }
