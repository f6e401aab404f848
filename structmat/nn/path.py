"""Which way a structured product is computed: by its factors, or materialised and multiplied as one GEMM."""

from __future__ import annotations

from structmat.structures import Bound
from structmat.structures.algebra import BoundProduct, BoundSum
from structmat.structures.wrappers import Wrapper

EFFICIENCY = {
    "dense": 1.0,
    "low_rank": 0.9,
    "spectral": 0.9,
    "diagonal": 0.01,
    "block_diagonal": 0.3,
    "block_low_rank": 0.5,
    "monarch": 0.5,
    "block_tensor_train": 0.3,
    "kronecker": 0.35,
    "tensor_train": 0.27,
    "random_sparse": 0.05,
    "n_m_sparse": 0.35,
    "quantized": 1.0,
    "tensor_ring": 0.12,
    "tucker": 0.035,
    "cp": 0.12,
    "block_sparse": 0.4,
    "channel_sparse": 0.85,
    "dictionary": 0.07,
    "einsum": 0.3,
    "blast": 0.1,
    "fourier": 0.09,
    "dct": 0.08,
    "hadamard": 0.45,
    "toeplitz": 0.08,
    "circulant": 0.13,
    "block_circulant": 0.13,
    "butterfly": 0.15,
}
"""FLOP rate of each family's factored product relative to one dense GEMM: typical of its rows at n = 2048 and 4096, batch
512, forward and backward, in results/bench/cpu.json (quantized: a dense GEMM on either path). On other machines the
break-even moves; `path` overrides it."""

DEFAULT = 0.3


def relative_time(bound: Bound, rows: int) -> float:
    """Estimated time of the factored product in units of dense-GEMM FLOPs."""
    if isinstance(bound, BoundSum):
        return sum(relative_time(t, rows) for t in bound.terms)
    if isinstance(bound, BoundProduct):
        return relative_time(bound.a, rows) + relative_time(bound.b, rows)
    if isinstance(bound, Wrapper):
        return relative_time(bound.inner, rows)
    return bound._flops(rows) / EFFICIENCY.get(bound.structure.name, DEFAULT)


def choose_path(bound: Bound, rows: int, kernel: float | None = None) -> tuple[str, str]:
    """(`factored` or `dense`, the reason) for a product with `rows` rows, from the measured efficiencies.

    kernel: the efficiency of the kernels that would run the factored product, None where none would.
    """
    if not bound.may_densify:
        return "factored", f"{bound.structure.name} has no other way"
    factored = bound._flops(rows) / kernel if kernel else relative_time(bound, rows)
    dense = bound.cost(rows, path="dense").flops_executed
    path = "dense" if dense < factored else "factored"
    return path, f"estimated {factored:.3g} factored against {dense:.3g} dense, in dense-GEMM FLOPs at {rows} rows"
