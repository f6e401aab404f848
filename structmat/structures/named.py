"""What has a name and static arguments, and so a text form: structures, and methods of training."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from structmat.structures.arguments import check_value, hints
from structmat.structures.errors import StructureError


@dataclasses.dataclass(frozen=True, repr=False)
class Named:
    """A frozen dataclass of arguments, each checked against its annotation; `str` prints all of them and parses back."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        wanted = hints(type(self))
        for field in dataclasses.fields(self):
            value = check_value(getattr(self, field.name), wanted[field.name], f"{self.name}: {field.name}")
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Refuse argument values that are never valid."""

    def need(self, **least: int) -> None:
        """Refuse an int argument that is set and below its least value."""
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise StructureError(f"{self.name}: {name} must be at least {low}, got {value}")

    @classmethod
    def text_fields(cls) -> list[dataclasses.Field[Any]]:
        """All arguments in the order of the text form."""
        return list(dataclasses.fields(cls))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in self.text_fields())})"

    __repr__ = __str__

    def short(self) -> str:
        """The text form without arguments left at their default; for tables and logs."""
        shown = [f for f in self.text_fields() if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"
