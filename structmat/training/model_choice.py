"""What a task knows of each model it can train: the fields of its config, what they may be, and how it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from structmat.training.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """One entry of a task's MODELS.

    Attributes:
      fields: `config.model` less `name`, every field at its default.
      check: (config) -> None; raises ConfigError where no such model exists.
      build: (config) -> the module, all sites dense.
      base: (config) -> the dense module of width `config.mup.base_width`.
      optional: further fields, with values of their types, that a config may leave out and the defaults do: what the
        model of somebody else's weights needs.
    """

    fields: Mapping[str, Any]
    check: Callable[[Any], None]
    build: Callable[[Any], nn.Module]
    base: Callable[[Any], nn.Module]
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)


def at_least_one(model: Any, names: Sequence[str]) -> None:
    """Refuse sizes below 1."""
    for name in names:
        if model[name] < 1:
            raise ConfigError(f"model.{name}", model[name], "must be at least 1")


def divides(model: Any, name: str, whole: str) -> None:
    """Refuse `model.name` unless it divides `model.whole`; both at least 1."""
    value, total = model[name], model[whole]
    if total % value:
        near = min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: abs(d - value))
        raise ConfigError(f"model.{name}", value, f"must divide model.{whole}={total}", f"{near} does")
