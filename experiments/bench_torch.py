"""The products of the GPU benchmark in PyTorch, where it is installed with CUDA: compiled, block sparse and 2:4."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax


def missing() -> str:
    """Why PyTorch cannot be timed, or ""."""
    if importlib.util.find_spec("torch") is None:
        return "torch not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch without CUDA"


def apply(op: str) -> Callable[..., Any] | None:
    """(x, *weights) -> y with the arrays of `experiments.products`, or None for an operation not written here."""
    return {
        "block_sparse": _block_sparse,
        "monarch": _monarch,
        "low_rank": lambda x, a, b: (x @ a.t()) @ b,
        "block_diagonal": lambda x, w: _joined(_blocks(x, w.shape[0]) @ w),
        "kronecker": _kronecker,
        "low_rank_plus_block_sparse": lambda x, a, b, values, rows: (x @ a.t()) @ b + _block_sparse(x, values, rows),
    }.get(op)


def linear(x: Any, weight: Any) -> Any:
    """x weight^T."""
    from torch.nn.functional import linear

    return linear(x, weight)


def _bsr(x: Any, values: Any, rows: Any) -> tuple[Any, Any]:
    """x and W^T of a block-sparse W in torch's blocked rows."""
    import torch

    (columns, count, p, s), k = values.shape, x.shape[1]
    crow = torch.arange(columns + 1, device=x.device, dtype=torch.int32) * count
    blocks = values.reshape(-1, p, s).transpose(1, 2).contiguous()
    return x, torch.sparse_bsr_tensor(crow, rows.reshape(-1), blocks, size=(columns * s, k))


def _two_of_four(x: Any, values: Any, rows: Any) -> tuple[Any, Any]:
    """x and any 2:4 matrix of the same width, for its time."""
    import torch

    dense = torch.randn(values.shape[0] * values.shape[3], x.shape[1], device=x.device, dtype=x.dtype)
    kept = torch.tensor([True, True, False, False], device=x.device).repeat(x.shape[1] // 4)
    return x, torch.sparse.to_sparse_semi_structured(dense * kept)


SPARSE: dict[str, dict[str, Callable[..., tuple[Any, Any]]]] = {
    "block_sparse": {"torch_bsr": _bsr, "torch_2_4": _two_of_four}
}
"""Operands of `linear` for PyTorch's own sparse products, forward: of the same matrix, and of any 2:4 one."""


def tensors(arrays: list[jax.Array]) -> list[Any]:
    """The same memory as torch tensors."""
    import torch

    return [torch.from_dlpack(a) for a in arrays]


def both(function: Callable[..., Any], x: Any, g: Any, weights: list[Any]) -> Callable[[], Any]:
    """() -> y and the gradients of x and of the floating weights."""
    import torch

    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (x, *weights)]
    wanted = [t for t in leaves if t.requires_grad]

    def run() -> Any:
        y = function(*leaves)
        return y, torch.autograd.grad(y, wanted, g)

    return run


def seconds(run: Callable[[], Any], repeats: int, samples: int) -> float:
    """Median over samples of the time between two CUDA events round `repeats` runs, per run."""
    import torch

    call, times = _captured(run), []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as the replay of a CUDA graph, without the gaps of Python's launches, or itself where it cannot be captured."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # some sparse products ask the GPU for sizes on their way
        torch.cuda.synchronize()
        return run
    return graph.replay


def error(y: Any, x: Any, dense: Any) -> float:
    """Largest error of y over the largest entry of x times the f32 matrix."""
    want = x.float() @ dense
    return float((y.float() - want).abs().max() / want.abs().max())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it for exactly its shapes."""
    import torch

    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def give_back() -> None:
    """Return memory that jax will need."""
    import torch

    torch.cuda.empty_cache()


def _blocks(x: Any, count: int) -> Any:
    """x (M, count w) -> (count, M, w)."""
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def _joined(y: Any) -> Any:
    """(count, M, w) -> (M, count w)."""
    return y.transpose(0, 1).reshape(y.shape[1], -1)


def _block_sparse(x: Any, values: Any, rows: Any) -> Any:
    columns, count, p, s = values.shape
    panels = x.view(x.shape[0], -1, p)[:, rows.reshape(-1).long()]
    return _joined(_blocks(panels.reshape(x.shape[0], -1), columns) @ values.reshape(columns, count * p, s))


def _monarch(x: Any, right: Any, left: Any) -> Any:
    (k, p, l, r), s = right.shape, left.shape[3]
    z = _blocks(x, k) @ right.reshape(k, p, l * r)
    z = z.view(k, -1, l, r).permute(2, 1, 0, 3).reshape(l, -1, k * r)
    return _joined(z @ left.reshape(l, k * r, s))


def _kronecker(x: Any, a: Any, b: Any) -> Any:
    (_, n1, m1), (_, n2, m2) = a.shape, b.shape
    grid = x.view(-1, n1, n2)
    return sum((u.t() @ (grid @ v)).reshape(-1, m1 * m2) for u, v in zip(a, b))
