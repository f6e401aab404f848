"""A method of training by its name: what a config says beside the structure, the optimiser and the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from structmat.nn.sites import Site
from structmat.structures.named import Named


@dataclasses.dataclass(frozen=True, repr=False)
class Method(Named):
    """Static choices with a text form, such as `rigl(every=100, drop=0.3, until=0.8)`; its hooks say what it changes.

    A hook is asked for with the sites of the model that is trained, and returns what a run uses in that place.
    """

    def rule(self, sites: Mapping[str, Site], steps: int) -> Any:
        """What acts on the state after the optimiser, as `structmat.training.rule.Rule` describes.

        Args:
          sites: of the model.
          steps: of the whole run.

        Raises:
          StructureError: no site is one the method acts on, or it would never act; names what would be valid.
        """
        raise TypeError(f"{type(self).__name__} does not define rule")
