"""What all structures made of other structures share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from structmat.structures.errors import StructureError
from structmat.structures.recipe import Structure


@dataclasses.dataclass(frozen=True, repr=False)
class Composite(Structure):
    """Base of structures made of others: `init` and `train` belong to the parts.

    Attributes:
      adds_auxiliary: whether its Bound adds to the loss what its parts do.
    """

    adds_auxiliary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in ("init", "train"):
            if getattr(self, field) != getattr(Structure, field):
                raise StructureError(f"{self.name}: set {field} on the parts, not on the whole")
        super().__post_init__()

    def parts(self) -> tuple[Structure, ...]:
        """The operands in text order."""
        return tuple(v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Structure))

    def _text(self, show: Callable[[Structure], str]) -> str:
        shown = []
        for f in self.own_fields():
            value = getattr(self, f.name)
            if isinstance(value, Structure):
                shown.append(show(value))
            elif show is str or value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{self.name}({', '.join(shown)})"

    def __str__(self) -> str:
        return self._text(str)

    __repr__ = __str__

    def short(self) -> str:
        return self._text(lambda s: s.short())
