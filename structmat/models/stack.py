"""Layers in sequence: adjacent ones with equal structures are scanned as one group, the others stand alone."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from structmat.nn.sites import group_name, scope

POLICIES = ("none", "full", "dots")


def groups(structures: tuple[tuple[str, Any], ...], prefix: str, layers: int, scan: bool) -> list[tuple[int, int]]:
    """(start, stop) of each run of layers with equal structures; runs of one where `scan` is off."""
    own = [scope(structures, f"{prefix}_{i}") for i in range(layers)]
    runs: list[tuple[int, int]] = []
    for i in range(layers):
        if runs and scan and own[i] == own[runs[-1][0]]:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def apply_layers(
    block: type[nn.Module],
    kwargs: dict[str, Any],
    x: Any,
    *broadcast: Any,
    structures: tuple[tuple[str, Any], ...],
    layers: int,
    scan: bool = True,
    remat: str = "none",
    prefix: str = "layers",
) -> Any:
    """Run `layers` blocks `(x, *broadcast) -> (x, None)` inside a compact method of the caller.

    Args:
      block: module class with a `structures` field; its call takes x and the broadcast arguments.
      remat: `none`, `full` (recompute everything) or `dots` (keep matrix products without batch dimensions).
    """
    if remat not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}, got {remat!r}")
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        block = nn.remat(block, policy=policy, prevent_cse=not scan, static_argnums=tuple(range(2, 2 + len(broadcast))))
    for start, stop in groups(structures, prefix, layers, scan):
        name, own = group_name(prefix, start, stop), scope(structures, f"{prefix}_{start}")
        if stop == start + 1:
            x, _ = block(**kwargs, structures=own, name=name)(x, *broadcast)
            continue
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "frozen": 0, "cache": 0, "probe": 0, "auxiliary": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=stop - start,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scanned(**kwargs, structures=own, name=name)(x, *broadcast)
    return x
