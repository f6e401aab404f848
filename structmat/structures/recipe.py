"""The recipe of a structure: a frozen dataclass of static choices, which `bind` turns into a `Bound`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from structmat.structures.errors import StructureError, nearest
from structmat.structures.leaf import Shape
from structmat.structures.named import Named

if TYPE_CHECKING:
    from structmat.structures.base import Bound

InitMode = Literal["spectral", "variance", "paper"]


def as_shape(shape: int | Shape, what: str) -> Shape:
    """A size as a tuple; raises StructureError, which names `what`, unless all are ints of at least 1."""
    out = (shape,) if isinstance(shape, int) else tuple(shape)
    if not out or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in out):
        raise StructureError(f"{what} must be a positive int or a tuple of them, got {shape!r}")
    return out


@dataclasses.dataclass(frozen=True, repr=False)
class Structure(Named):
    """A recipe: static choices without sizes.

    Every family takes, besides its own arguments:
      init: `spectral` (std sqrt(min(f, g))/f per factor, goes with structure-aware learning rates), `variance`
        (output RMS equals input RMS) or `paper` (the method's own).
      train: names of the leaves that train, or None for the family's own choice; the rest is frozen.
    """

    _: dataclasses.KW_ONLY
    init: InitMode = "spectral"
    train: tuple[str, ...] | None = None

    @property
    def has_auxiliary(self) -> bool:
        """Whether it adds a term to the training loss."""
        return False

    def bind(self, in_shape: int | Shape, out_shape: int | Shape) -> Bound:
        """Check the sizes and return the Bound for a weight of `in_shape` x `out_shape`.

        Raises:
          StructureError: sizes that do not fit, naming the values and the nearest valid choice.
        """
        bound = self._bind(as_shape(in_shape, f"{self.name}: in_shape"), as_shape(out_shape, f"{self.name}: out_shape"))
        if self.train is not None:
            bound.leaves()  # refuses names of leaves there are not
        return bound

    def _bind(self, in_shape: Shape, out_shape: Shape) -> Bound:
        raise TypeError(f"{type(self).__name__} does not define _bind")

    def candidates(self, in_shape: Shape, out_shape: Shape) -> list[Structure]:
        """Members of the family that fit these sizes, cheapest first; `fit` chooses among them. Empty if fixed."""
        return []

    def required(self, *names: str) -> None:
        """Refuse to bind while one of these arguments is unset."""
        for name in names:
            if getattr(self, name) is None:
                raise StructureError(
                    f"{self.name} needs {name}=...; set it, or let fit({self.name}(...), params=0.25) choose it"
                )

    def choose(self, argument: str, valid: Sequence[int], in_shape: Shape, out_shape: Shape) -> None:
        """Refuse an int argument that is not among `valid` for these sizes."""
        value = getattr(self, argument)
        if value not in valid:
            raise StructureError(
                f"{self.name}: {argument}={value} does not fit a weight of shape "
                f"({math.prod(in_shape)}, {math.prod(out_shape)}); nearest valid: {nearest(value, valid)}"
            )

    @classmethod
    def own_fields(cls) -> list[dataclasses.Field[Any]]:
        """The family's own arguments in declared order, without `init` and `train`."""
        return [f for f in dataclasses.fields(cls) if f.name not in ("init", "train")]

    @classmethod
    def text_fields(cls) -> list[dataclasses.Field[Any]]:
        """All arguments in the order of the text form: the family's own, then `init` and `train`."""
        return cls.own_fields() + [f for f in dataclasses.fields(cls) if f.name in ("init", "train")]

    def __add__(self, other: Structure) -> Structure:
        from structmat.structures.algebra import Sum

        return Sum.of(self, other) if isinstance(other, Structure) else NotImplemented

    def __matmul__(self, other: Structure) -> Structure:
        from structmat.structures.algebra import Product

        return Product(self, other) if isinstance(other, Structure) else NotImplemented

    def __mul__(self, other: Structure) -> Structure:
        from structmat.structures.elementwise import Elementwise

        if isinstance(other, int | float):
            raise StructureError(f"* multiplies two structures entry by entry; write scaled({self.short()}, s={other})")
        return Elementwise(self, other) if isinstance(other, Structure) else NotImplemented

    __rmul__ = __mul__
