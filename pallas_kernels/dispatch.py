"""Which implementation of a product runs, and why: the one place where that is decided.

Every operation has `choose(shapes..., chip) -> Choice`, its documented rule, and calls `resolve` with what its user asked
for. `None` follows the rule, "xla" is the reference in jax.numpy, "pallas" is the kernel or an error that says why not.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

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
    """

    implementation: Implementation
    reason: str
    unsupported: str = ""
    flop_reduction: float = 1.0
    bound: float = float("inf")


def resolve(op: str, asked: str | None, choice: Choice, chip: Chip) -> Implementation:
    """The implementation to run.

    Raises:
      KernelError: an unknown name, or "pallas" where the kernel does not apply.
    """
    if asked is None:
        return choice.implementation
    if asked not in IMPLEMENTATIONS:
        near = difflib.get_close_matches(str(asked), IMPLEMENTATIONS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KernelError(f"{op}: implementation must be None, 'xla' or 'pallas', got {asked!r}{hint}")
    if asked == "pallas" and choice.unsupported:
        raise KernelError(f"{op}: no kernel on {chip.name}: {choice.unsupported}; implementation=None would use xla")
    return asked
