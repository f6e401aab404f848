"""Baselines of equal size: the widest dense model, or the largest member of a family, with no more parameters."""

from __future__ import annotations

import functools
from typing import Any

from ml_collections import ConfigDict

from structmat.nn import Site
from structmat.nn.sites import bind
from structmat.structures import Rules, Structure, StructureError
from structmat.training.config import validate
from structmat.training.errors import ConfigError


def with_model(config: ConfigDict, structure: str, **model: Any) -> ConfigDict:
    """A copy of the config with this structure and these fields of `model`."""
    own = ConfigDict(config.to_dict())
    own.structure = structure
    own.model.update(model)
    return own


def params_of(config: ConfigDict) -> int:
    """Parameters of the whole model."""
    return validate(config, devices=1).params


def dense_small(config: ConfigDict, params: int) -> ConfigDict | None:
    """The widest dense model with at most `params` parameters, in whole heads where the model has them (of even size where
    its positions are rotary), with `hidden` in proportion; None if there is none, as where a model has no width."""
    m = config.model
    if "width" not in m:
        return None
    unit = m.get("heads", 1) * (2 if "kv_heads" in m else 1)
    low, high = 1, m.width // unit

    def at(units: int) -> ConfigDict:
        width = units * unit
        hidden = {"hidden": max(1, round(m.hidden * width / m.width))} if "hidden" in m else {}
        return with_model(config, "dense()", width=width, **hidden)

    if params_of(at(1)) > params:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if params_of(at(middle)) <= params else (low, middle - 1)
    return at(low)


def of_share(config: ConfigDict, text: str, params: int, precision: float = 1 / 512) -> ConfigDict:
    """The config with the largest share in `text` whose model has at most `params` parameters.

    Args:
      text: structure or rules with `{share}` in it, the fraction of a site's dense parameters.
      precision: steps of the share.

    Raises:
      ConfigError: even the smallest share has more.
    """
    at = lambda share: with_model(config, text.format(share=round(share, 6)))

    dense = validate(with_model(config, "dense()"), devices=1)
    kinds = {path: site.kind for path, site in dense.table.items()}

    def fits(steps: int) -> bool:
        """Counted by site: tracing the model at every share would take seconds each."""
        size = dense.params
        try:
            for path, structure in Rules.of(at(steps * precision).structure).matched(kinds).items():
                site = dense.table[path]
                size += _params(structure, site) - site.bound.params
        except StructureError:
            return True  # no member is so small
        return size <= params

    low, high = 0, round(1 / precision)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    found = at(low * precision) if low else None
    if found is None or params_of(found) > params:
        raise ConfigError("structure", text, f"no member has at most {params:,} parameters in all")
    return found


@functools.lru_cache(maxsize=1024)
def _params(structure: Structure, site: Site) -> int:
    return bind("", site, structure).params
