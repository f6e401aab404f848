"""Sparse iso-FLOP transformations: larger sparse layers in place of dense ones, whose non-zeros multiply as often.

Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency", ICML 2024,
arXiv 2303.11525. FLOPs are those of non-zeros: masks are simulated, stored and multiplied as dense weights, so that no step
is faster for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from ml_collections import ConfigDict

from experiments.equal import with_model
from structmat.nn import Site
from structmat.structures.errors import suggest
from structmat.training.config import validate
from structmat.training.errors import ConfigError
from structmat.training.task import Task

Member = Literal["wide", "parallel", "factorised", "doped"]
MEMBERS: tuple[str, ...] = get_args(Member)
CONVOLUTIONS = re.compile(r"layers_\d+/conv\d?(/conv)?")
"""Layer paths of those that are transformed: not the first one, and none of shortcuts."""


def transformed(task: Task) -> dict[str, Site]:
    """The sites that are: linear ones and CONVOLUTIONS; embeddings, heads and the others stay dense."""
    chosen = lambda path, site: site.kind == "linear" or (site.kind == "conv" and CONVOLUTIONS.fullmatch(path))
    return {path: site for path, site in task.table.items() if chosen(path, site)}


def changes(config: ConfigDict, member: Member, sparsity: float) -> dict[str, Any]:
    """Fields of the config to change, by dotted name, for a model of the same FLOPs whose layers are sparse.

    `wide` multiplies the model's width by 1/sqrt(1 - sparsity) and masks its linear sites, and convolutions but the first and
    those of shortcuts, so that the whole model has the FLOPs of the dense one: what a site gains in size it loses in density,
    and sites that stay dense are paid for by all.
    `parallel` adds round(1/(1 - sparsity)) branches, each with a ReLU; `factorised` puts two sparse factors around a ReLU;
    `doped` adds a dense low rank to a sparse weight. Masked weights start 1/sqrt(density) larger. Optimisation is as it was.

    Args:
      config: of a dense model with a field `model.width`. sparsity: fraction of zeros, in [0, 1).

    Returns:
      `structure`, and for `wide` `model.width`; nothing at sparsity 0, which is the dense model.

    Raises:
      ConfigError: a config that is not dense, an unknown member, a sparsity out of range, or so low that the widened parts
        that stay dense already cost more than it leaves.
    """
    if member not in MEMBERS:
        raise ConfigError("structure", member, "no such member of Sparse-IFT" + suggest(member, MEMBERS))
    if not 0 <= sparsity < 1:
        raise ConfigError("structure", f"{member} at sparsity {sparsity}", "sparsity must be in [0, 1)", "0.75 is")
    task = validate(config, devices=1)
    if any(site.bound.structure.name != "dense" for site in task.table.values()):
        raise ConfigError("structure", config.structure, "Sparse-IFT starts from a dense model", "'dense()' is")
    if sparsity == 0:
        return {}
    if member == "wide":
        return _wide(config, sparsity)
    law = {"parallel": parallel, "factorised": factorised, "doped": doped}[member]
    return {"structure": _rules(task, lambda path, site: law(site.bound.d_in, site.bound.d_out, sparsity))}


def masked(density: float) -> str:
    """A dense weight of which `density` trains, as text; a method may move which."""
    return f"masked(dense(), unstructured(density={round(density, 9)!r}, rescale=True), rule='plain')"


def parallel(d_in: int, d_out: int, sparsity: float) -> str:
    """Branches as text; their density is that of their number, so that rounding it costs nothing."""
    count = round(1 / (1 - sparsity))
    return f"parallel({masked(1 / count)}, count={count}, activation='relu')"


def factorised(d_in: int, d_out: int, sparsity: float) -> str:
    """Two sparse factors as text; the inner size is rounded up."""
    inner = math.ceil(round(d_in * d_out / ((1 - sparsity) * (d_in + d_out)), 6))
    return f"bottleneck({masked(1 - sparsity)}, {masked(1 - sparsity)}, inner={inner}, activation='relu')"


def doped(d_in: int, d_out: int, sparsity: float) -> str:
    """A sparse weight and a dense low rank as text; the rank is rounded down."""
    rank = int(round(sparsity * d_in * d_out / (d_in + d_out), 6))
    return masked(1 - sparsity) + (f" + low_rank(rank={rank})" if rank else "")


def _wide(config: ConfigDict, sparsity: float) -> dict[str, Any]:
    unit = config.model.get("heads", 1)
    width = max(1, round(config.model.width / math.sqrt(1 - sparsity) / unit)) * unit
    dense, wide = (validate(own, devices=1) for own in (config, with_model(config, config.structure, width=width)))
    flops = lambda task, path: task.rows_at(path) * task.accumulate * task.table[path].bound.cost(1).flops / task.units
    narrow, grown = ({path: flops(task, path) for path in transformed(task)} for task in (dense, wide))
    left = dense.flops() - (wide.flops() - sum(grown.values()))
    if left <= 0:
        raise ConfigError(
            "model.width",
            width,
            f"at sparsity {sparsity} what stays dense costs more than the whole dense model",
            "lower it",
        )
    share = left / sum(narrow.values())
    density = lambda path: min(1.0, share * narrow[path] / grown[path])
    return {"model.width": width, "structure": _rules(wide, lambda path, site: masked(density(path)))}


def _rules(task: Any, text: Callable[[str, Any], str]) -> str:
    """One rule per text, for all sites that have it."""
    found: dict[str, list[str]] = {}
    for path, site in transformed(task).items():
        found.setdefault(text(path, site), []).append(re.escape(path))
    return "; ".join(f"{'|'.join(paths)} -> {own}" for own, paths in found.items())
