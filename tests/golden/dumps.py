"""The text of a config and of the parameters it trains; writes the files beside it:

    python -m tests.golden.dumps

Read the diff before committing it: a run's folder and its checkpoints know these names, shapes and values.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.core import meta
from ml_collections import ConfigDict

from structmat.nn import leaf_groups
from structmat.parallel.rules import path_of
from structmat.training.config import default, validate
from structmat.training.state import abstract_variables
from structmat.training.task import Task

FOLDER = Path(__file__).parent
NAMED = {
    "demo": ("demo", None),
    "demo_lm": ("demo_lm", None),
    "demo_lm_low_rank": ("demo_lm", "low_rank"),
    "demo_lm_monarch": ("demo_lm", "monarch"),
    "demo_lm_kronecker": ("demo_lm", "kronecker"),
    "digits": ("digits", None),
    "digits_vit": ("digits_vit", None),
    "digits_resnet": ("digits_resnet", None),
    "teacher": ("teacher", None),
    "navier_stokes": ("navier_stokes", None),
    **{f"navier_stokes_{model}": ("navier_stokes", model) for model in ("tfno", "monarch", "unet", "resnet")},
    **{f"mri_{model}": ("mri", model) for model in ("msense", "unet")},
    **{f"llama_{size}": ("llama", size) for size in ("60m", "130m", "350m", "1b", "7b")},
    **{f"gpt2_{size}": ("gpt2", size) for size in ("small", "medium", "large")},
    **{f"vit_{size}": ("vit", size) for size in ("s", "b", "s768")},
    **{f"mixer_{size}": ("mixer", size) for size in ("s", "b")},
    **{f"resnet_{depth}": ("resnet", depth) for depth in ("20", "32", "18", "50")},
    "vgg_19": ("vgg", "19"),
}
"""Name of a dump -> file under configs/ and its argument."""
DEFAULTS = {"default_llama": ("lm", "llama"), "default_mixer": ("images", "mixer")}
"""Name of a dump -> task and model; the other tasks' defaults are in the configs above."""


def config_of(name: str) -> ConfigDict:
    """The config a dump describes."""
    if name in DEFAULTS:
        return default(*DEFAULTS[name])
    file, argument = NAMED[name]
    return importlib.import_module(f"configs.{file}").get_config(argument)


def task_of(config: ConfigDict) -> Task:
    """Its task on one device, whatever arms a comparison trains beside it."""
    return validate(ConfigDict({key: value for key, value in config.to_dict().items() if key != "compare"}), devices=1)


def dump(config: ConfigDict, task: Task) -> str:
    """Lines of fields, of structures by site (a scanned group is one), and of arrays with their logical axes."""
    lines = [f"{key} = {value!r}" for key, value in _flat(config.to_dict())]
    lines += ["", f"{task.params} parameters, {task.flops()} FLOPs forward per {task.unit}", ""]
    for place, (_, site) in leaf_groups(task.table).items():
        lines.append(f"{'/'.join(place)}: {site.kind} {site.bound.d_in} x {site.bound.d_out} {site.bound.structure}")
    lines.append("")
    is_box = lambda node: isinstance(node, meta.AxisMetadata)
    for path, node in jax.tree_util.tree_leaves_with_path(abstract_variables(task), is_leaf=is_box):
        held, axes = (node.value, node.names) if is_box(node) else (node, (None,) * node.ndim)
        named = ", ".join(str(axis or "-") for axis in axes)
        lines.append(f"{'/'.join(path_of(path))}: {held.dtype} {held.shape} ({named})")
    return "\n".join(lines) + "\n"


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(node):
        if isinstance(node[key], Mapping):
            yield from _flat(node[key], f"{prefix}{key}.")
        else:
            yield prefix + key, node[key]


def main() -> None:
    """Write every dump."""
    for name in (*NAMED, *DEFAULTS):
        config = config_of(name)
        (FOLDER / f"{name}.txt").write_text(dump(config, task_of(config)))


if __name__ == "__main__":
    main()
