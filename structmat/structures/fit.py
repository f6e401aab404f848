"""`fit(a, params=0.25)`: at bind time, the largest member of `a` within a fraction of the dense matrix."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import ClassVar

from structmat.structures.algebra import Sum
from structmat.structures.base import Bound
from structmat.structures.composite import Composite
from structmat.structures.dense import Dense
from structmat.structures.errors import StructureError
from structmat.structures.leaf import Shape
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Fit(Composite):
    """Equal-budget choice: exactly one of `params`, `flops`, `bits`, a fraction in (0, 1] of the dense matrix's.

    Binding resolves it: the Bound's structure has the chosen arguments spelled out. In a sum, terms with all arguments
    given are paid first; the free terms then split the rest evenly in text order, a later one taking what an earlier
    one left.

    Examples:
      >>> from structmat.structures import parse
      >>> parse("fit(low_rank(), params=0.25)").bind(1024, 1024).structure.short()
      'low_rank(rank=128)'
      >>> parse("fit(low_rank() + random_sparse(density=0.05), bits=0.25)").bind(1024, 1024).structure.short()
      'low_rank(rank=77) + random_sparse(density=0.05)'
    """

    a: Structure
    params: float | None = None
    flops: float | None = None
    bits: float | None = None
    name: ClassVar[str] = "fit"

    @property
    def budget(self) -> tuple[str, float]:
        """(metric, fraction of dense)."""
        return next((m, f) for m in ("params", "flops", "bits") if (f := getattr(self, m)) is not None)

    def check(self) -> None:
        given = [m for m in ("params", "flops", "bits") if getattr(self, m) is not None]
        if len(given) != 1:
            raise StructureError(f"fit needs exactly one of params=, flops=, bits=, got {', '.join(given) or 'none'}")
        metric, fraction = self.budget
        if not 0 < fraction <= 1:
            raise StructureError(f"fit: {metric}={fraction} must be a fraction of dense in (0, 1]")

    def _bind(self, in_shape: Shape, out_shape: Shape) -> Bound:
        metric, fraction = self.budget
        cost = lambda s: getattr(s.bind(in_shape, out_shape).cost(1), metric)
        dense = cost(Dense())
        return self._resolve(in_shape, out_shape, fraction * dense, dense, cost).bind(in_shape, out_shape)

    def _resolve(
        self, in_shape: Shape, out_shape: Shape, budget: float, dense: int, cost: Callable[[Structure], int]
    ) -> Structure:
        terms = list(self.a.terms) if isinstance(self.a, Sum) else [self.a]
        options = [t.candidates(in_shape, out_shape) for t in terms]
        free = [i for i, c in enumerate(options) if c]
        if not free:
            raise StructureError(
                f"fit: {self.a.short()} leaves nothing to choose for a weight of shape {in_shape} -> {out_shape}; "
                "leave an argument such as rank, blocks or density unset"
            )
        left = budget - sum(cost(t) for i, t in enumerate(terms) if i not in free)
        for position, i in enumerate(free):
            allowed = left / (len(free) - position)
            best = bisect.bisect_right(options[i], allowed, key=cost) - 1
            if best < 0:
                metric, fraction = self.budget
                smallest = options[i][0]
                raise StructureError(
                    f"fit: {metric}={fraction} leaves {max(allowed, 0) / dense:.4f} of dense for {terms[i].short()}, whose "
                    f"smallest member {smallest.short()} needs {cost(smallest) / dense:.4f} at {in_shape} -> {out_shape}"
                )
            terms[i] = options[i][best]
            left -= cost(terms[i])
        return Sum.of(*terms) if len(terms) > 1 else terms[0]
