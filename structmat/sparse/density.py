"""How dense each layer is when the whole model has a given density: uniform, or ERK (Evci et al., arXiv 1911.11134)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from structmat.nn import Site
from structmat.structures import StructureError
from structmat.structures.errors import suggest

HOW = ("uniform", "erk")


def densities(
    sites: Mapping[str, Site],
    density: float,
    how: Literal["uniform", "erk"] = "erk",
    kinds: tuple[str, ...] = ("linear",),
) -> dict[str, float]:
    """The density of every site, such that together they keep `density` of their entries.

    ERK gives each site a density in proportion to the sum of its sizes over their product (of a convolution also the
    sides of its kernel), so that small and narrow layers stay denser; those that would exceed 1 are dense.

    Args:
      sites: of a model. density: in (0, 1]. kinds: of sites to make sparse; the others are left out of the count.

    Returns:
      layer path -> density.

    Raises:
      StructureError: a density out of range, an unknown `how`, or no site of these kinds.
    """
    if not 0 < density <= 1:
        raise StructureError(f"densities: density must be in (0, 1], got {density}")
    if how not in HOW:
        raise StructureError(f"densities: how got {how!r}" + suggest(how, HOW))
    chosen = {path: site for path, site in sites.items() if site.kind in kinds}
    if not chosen:
        there = dict.fromkeys(site.kind for site in sites.values())
        raise StructureError(f"densities: no site of kind {', '.join(kinds)}; there are: {', '.join(there)}")
    if how == "uniform":
        return dict.fromkeys(chosen, float(density))
    size = {path: site.bound.d_in * site.bound.d_out for path, site in chosen.items()}
    raw = {path: _sides(site) / size[path] for path, site in chosen.items()}
    found: dict[str, float] = {}
    while len(found) < len(chosen):
        sparse = [path for path in chosen if path not in found]
        left = density * sum(size.values()) - sum(size[path] for path in found)
        scale = left / sum(raw[path] * size[path] for path in sparse)
        full = [path for path in sparse if scale * raw[path] > 1]
        found |= dict.fromkeys(full, 1.0) if full else {path: scale * raw[path] for path in sparse}
    return {path: found[path] for path in chosen}


def _sides(site: Site) -> int:
    shape = site.bound.in_shape if site.kind == "conv" else (site.bound.d_in,)
    return sum(shape) + site.bound.d_out


def rules_text(
    sites: Mapping[str, Site],
    density: float,
    how: Literal["uniform", "erk"] = "erk",
    kinds: tuple[str, ...] = ("linear",),
    rescale: bool = False,
) -> str:
    """`densities` as a value of `config.structure`: one rule per site; every weight trains under a mask, but for those of
    density 1, which are dense."""
    pattern = lambda d: f"unstructured(density={d!r}, rescale={rescale})"
    shown = lambda d: f"masked(dense(), {pattern(d)}, rule='plain')" if d < 1 else "dense()"
    found = densities(sites, density, how, kinds).items()
    return "; ".join(f"{re.escape(path)} -> {shown(d)}" for path, d in found)
