"""Every method a config can name. A new one is one line: its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ml_collections import ConfigDict

from structmat.nn import Site
from structmat.nn.method import Method
from structmat.sparse import TRP, Maestro, ReLoRA, RigL, Set, Sst
from structmat.structures import StructureError
from structmat.structures.reader import Reader
from structmat.training.distill import Distill
from structmat.training.errors import ConfigError

if TYPE_CHECKING:
    from structmat.training.rule import Rule

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Distill,
        Maestro,
        ReLoRA,
        RigL,
        Set,
        Sst,
        TRP,
    )
}


class _Reader(Reader):
    """A single name with its arguments."""

    kind: ClassVar[str] = "method"
    example: ClassVar[str] = "rigl(every=100, drop=0.3)"


def method_of(config: ConfigDict) -> Method | None:
    """The method `config.method` names; None if it is empty.

    Raises:
      ConfigError: unknown name or argument, with a suggestion; a wrong type or value.
    """
    if not config.method:
        return None
    try:
        return _Reader.read(config.method, METHODS)
    except StructureError as error:
        raise ConfigError("method", config.method, str(error)) from None


def hook(
    config: ConfigDict, name: Literal["rule", "view", "penalty", "link", "teacher"], sites: Mapping[str, Site]
) -> Any:
    """What the method of a config brings in this place; None where there is no method, or it brings nothing.

    Args:
      sites: of the model that is trained.

    Raises:
      ConfigError: the method does not fit the model or the number of steps.
    """
    method = method_of(config)
    try:
        return None if method is None else getattr(method, name)(sites, config.steps)
    except StructureError as error:
        raise ConfigError("method", config.method, str(error)) from None


def report_of(config: ConfigDict, sites: Mapping[str, Site], variables: Mapping[str, Any]) -> dict[str, Any]:
    """What the method of a config says of the model trained; {} where there is no method."""
    method = method_of(config)
    return {} if method is None else method.report(sites, variables)


def without_method(config: ConfigDict) -> ConfigDict:
    """A copy of the config for what comes after training."""
    own = config.copy_and_resolve_references()
    own.method = ""
    return own


def rule_for(config: ConfigDict, sites: Mapping[str, Site], given: Rule | None = None) -> Rule | None:
    """The Rule of a run: that of `config.method`, or the one given in Python.

    Args:
      sites: of the model that is trained.

    Raises:
      ConfigError: both are there; or the method does not fit the model or the number of steps.
    """
    if method_of(config) is None:
        return given
    if given is not None:
        raise ConfigError("method", config.method, f"the rule {given!r} was given too", "one of the two is enough")
    return hook(config, "rule", sites)
