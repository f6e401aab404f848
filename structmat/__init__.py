"""structmat: one algebra of structured weight matrices, trained, compared and projected in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from structmat.structures import Matrix, Rules, Structure, StructureError, parse, project, random

if TYPE_CHECKING:
    from structmat.analysis.choose import choose

__version__ = "0.1.0"

__all__ = ["Matrix", "Rules", "Structure", "StructureError", "__version__", "choose", "parse", "project", "random"]


def __getattr__(name: str) -> Any:
    """`choose` is loaded when first asked for."""
    if name == "choose":
        from structmat.analysis.choose import choose

        return choose
    raise AttributeError(f"module 'structmat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
