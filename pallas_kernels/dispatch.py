"""Which implementation of a product runs, and why: the one place where that is decided.

Every operation has `choose(shapes..., chip) -> Choice`, its documented rule, and calls `resolve` with what its user asked
for. `None` follows the rule, "xla" is the reference in jax.numpy, "pallas" is the kernel or an error that says why not.

Kernels see the shapes of one device. Where an ambient mesh leaves the partitioning to the compiler, which cannot split
them, `None` is "xla"; `jax.shard_map` makes the axes manual, and the rule applies to the parts.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import AxisType

from pallas_kernels.chips import Chip

Implementation = Literal["xla", "pallas"]
IMPLEMENTATIONS = ("xla", "pallas")


class KernelError(ValueError):
    """An unsupported shape, dtype or implementation, named with what would be valid."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the rule says of one product on one chip.

    Attributes:
      implementation: what `None` runs.
      reason: in words, with the figures that decided.
      unsupported: why the kernel cannot run at all there, or "" where it can.
      flop_reduction: FLOPs of dense over those of the structure.
      bound: the most any structure can gain over dense at this shape on this chip.
      efficiency: FLOP rate of the kernel relative to one dense GEMM, typical of the compiler's estimates.
    """

    implementation: Implementation
    reason: str
    unsupported: str = ""
    flop_reduction: float = 1.0
    bound: float = float("inf")
    efficiency: float = 0.75


_ONLY_XLA: contextvars.ContextVar[bool] = contextvars.ContextVar("only_xla", default=False)
_ASKED: contextvars.ContextVar[list[tuple[str, Choice]] | None] = contextvars.ContextVar("asked", default=None)


@contextlib.contextmanager
def only_xla() -> Iterator[None]:
    """Within, None is "xla": for code that transposes or linearises a product, which the kernels' derivative rules refuse."""
    token = _ONLY_XLA.set(True)
    try:
        yield
    finally:
        _ONLY_XLA.reset(token)


@contextlib.contextmanager
def asking() -> Iterator[list[tuple[str, Choice]]]:
    """Within, every product traced adds (operation, what its rule says of these shapes) to the list, and runs as "xla"."""
    asked: list[tuple[str, Choice]] = []
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def partitioned() -> tuple[str, ...]:
    """Axes of the ambient mesh, wider than one device, over which the compiler partitions what is traced now."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    return tuple(
        n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual and mesh.shape[n] > 1
    )


def resolve(op: str, asked: str | None, choice: Choice, chip: Chip) -> Implementation:
    """The implementation to run.

    Raises:
      KernelError: an unknown name, or "pallas" where the kernel does not apply.
    """
    if (questions := _ASKED.get()) is not None:
        questions.append((op, choice))
        return "xla"
    if asked is None:
        return "xla" if _ONLY_XLA.get() or partitioned() else choice.implementation
    if asked not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(asked), IMPLEMENTATIONS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KernelError(f"{op}: implementation must be None, 'xla' or 'pallas', got {asked!r}{hint}")
    if asked == "pallas" and (axes := partitioned()):
        raise KernelError(f"{op}: kernels run on the parts of one device: call it inside jax.shard_map over {axes}")
    if asked == "pallas" and choice.unsupported:
        raise KernelError(f"{op}: no kernel on {chip.name}: {choice.unsupported}; implementation=None would use xla")
    return asked
