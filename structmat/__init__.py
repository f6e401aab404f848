"""structmat: one algebra of structured weight matrices, trained, compared and projected in JAX."""

from structmat.structures import Matrix, Rules, Structure, StructureError, parse, project

__version__ = "0.1.0"

__all__ = ["Matrix", "Rules", "Structure", "StructureError", "__version__", "parse", "project"]
