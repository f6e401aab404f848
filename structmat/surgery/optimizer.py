"""The optimiser's state when some parameters are new."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from structmat.nn.sites import layer_paths
from structmat.surgery.layers import Piece, by_layer, named, rebuild


def carry_optimizer(old: Any, template: Any, restarted: Mapping[str, Any], changed: Collection[str]) -> Any:
    """Optax's state for the new parameters: counts and what is kept of unchanged parameters, bit for bit; what is kept of
    changed ones from `restarted`.

    Args:
      old: the state. template: the new one's, as for `rebuild`.
      restarted: field of the state (`mu`, `nu`) -> what it now holds, a tree of arrays like the new parameters.
      changed: layer paths of the changed parameters, from `changed_params`.

    Raises:
      ValueError: the optimiser keeps something else of a changed parameter.
    """
    fresh = {field: by_layer(tree) for field, tree in restarted.items()}
    given: dict[str, Piece] = {}
    for path in named(template):
        for layer in layer_paths(path):
            field, param = _split(layer, changed)
            if param is None:
                continue
            if field not in fresh:
                raise ValueError(f"surgery: the optimiser keeps {field!r} of {param}; restarted: {', '.join(fresh)}")
            given[layer] = fresh[field][param]
    return rebuild(old, template, given)


def _split(path: str, changed: Collection[str]) -> tuple[str, str | None]:
    """(field, parameter) of a leaf that belongs to a changed parameter, else (..., None)."""
    parts = path.split("/")
    for start in range(1, len(parts)):
        if (param := "/".join(parts[start:])) in changed:
            return parts[start - 1], param
    return "", None
