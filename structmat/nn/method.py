"""A method of training by its name: what a config says beside the structure, the optimiser and the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from structmat.nn.sites import Site
from structmat.structures.named import Named

View = Callable[[Any, jax.Array, jax.Array], Any]
Penalty = Callable[[Mapping[str, Any], jax.Array], jax.Array]
Outputs = tuple[jax.Array, Mapping[str, jax.Array]]
"""(logits of a model, layer path of a module -> its output)."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model learns from another, its teacher, beside the data.

    Attributes:
      modules: layer paths of the modules whose outputs are compared beside the logits, such as `layers_0/mlp`.
      terms: (outputs of the model, of the teacher) -> name -> f32 (), means over examples; added to the loss.
    """

    modules: tuple[str, ...]
    terms: Callable[[Outputs, Outputs], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, repr=False)
class Method(Named):
    """Static choices with a text form, such as `rigl(every=100, drop=0.3, until=0.8)`; its hooks say what it changes.

    A hook is asked for with the sites of the model that is trained and the steps of the whole run, and returns what a run
    uses in that place, or None for nothing. Each may raise a StructureError where no site is one the method acts on, or it
    would never act, that names what would be valid.

    Attributes:
      has_teacher: whether it trains after the model of before a switch. Such a method needs a switch in the middle of the
        run, with which no other can go, and a task of logits; `teacher` and `report` are all its hooks.
      full_pass: whether the loss is that of the model itself, and what `view` makes of it learns the softmax of its logits;
        else the loss is that of the view. Needs a task of logits.
    """

    has_teacher: ClassVar[bool] = False
    full_pass: ClassVar[bool] = False

    def rule(self, sites: Mapping[str, Site], steps: int) -> Any:
        """What acts on the state after the optimiser, as `structmat.training.rule.Rule` describes."""
        return None

    def view(self, sites: Mapping[str, Site], steps: int) -> View | None:
        """(frozen leaves, key, step) -> the frozen leaves that the training loss sees on this step; evaluation sees the
        state's own. `step` counts from 0."""
        return None

    def penalty(self, sites: Mapping[str, Site], steps: int) -> Penalty | None:
        """(variables, step) -> f32 (), whose gradient by `params` is added to that of the loss. `step` counts from 0."""
        return None

    def link(self, sites: Mapping[str, Site], steps: int) -> Any:
        """An optax transformation of the updates, after all others."""
        return None

    def teacher(self, sites: Mapping[str, Site], steps: int) -> Lesson | None:
        """What the model learns, from the first switch in the middle of the run on, from what it was just before it:
        structures and parameters of then, which stay. None needs no teacher, and none is kept."""
        return None

    def report(self, sites: Mapping[str, Site], variables: Mapping[str, Any]) -> dict[str, Any]:
        """What a run's record says of the model trained, as JSON: `variables` are those after the last step."""
        return {}
