"""R7: meshes that do not fit their devices, and wrong axis names, are refused; meshes that fit use every device."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.torture.bad_configs import misspelt
from experiments.torture.children import results
from experiments.torture.figures import Trial, figure
from structmat.parallel import AXES, MeshError, make_mesh
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError

SIZES = ((1, 2), *(range(1, 9),) * 3)
"""Sizes tried on each axis."""


def refusal(call: Callable[[], Any]) -> str | None:
    """The message of an error a user is meant to read; None if there was none."""
    try:
        call()
    except (MeshError, ConfigError) as error:
        return str(error)
    return None


def check_shapes(report: Callable[[Any], None], counts: range) -> None:
    """Reports (fits, case, what is wrong) of every shape over the first 1, 2, ... of this process's devices."""
    for count in counts:
        devices = jax.devices()[:count]
        for shape in itertools.product(*SIZES):
            spec, fits = dict(zip(AXES, shape)), math.prod(shape) == count
            shown = "x".join(map(str, shape)).removeprefix("1x")  # a mesh of one replica has no such axis
            case = f"{shown} over {count} devices"
            if not fits:
                text = refusal(lambda: make_mesh(spec, devices))  # noqa: B023
                named = text is not None and f"{shown} (" in text and "nearest valid" in text
                report((False, case, "" if named else text or "accepted"))
                continue
            mesh = make_mesh(spec, devices)
            used = sorted(d.id for d in mesh.devices.flat)
            report((True, case, "" if used == sorted(d.id for d in devices) else f"uses devices {used}"))


def wrong_names(rng: random.Random) -> Iterator[dict[str, int]]:
    """Meshes with an axis misspelt, or of another library's name."""
    for name, size in itertools.product(AXES, (1, 2, 8)):
        yield {misspelt(name, set(AXES), rng): size}
    for name in ("model", "expert", "stage", "tp", "dp", "x", "", "DATA", "data "):
        yield {"data": -1, name: 1}


@figure("R7", "mesh shapes that do not fit 1 to 8 devices, and wrong axis names, refused", least=1000)
def meshes(trial: Trial, counts: range = range(1, 9)) -> None:
    """Every shape over 8 CPU devices in a child, wrong names and unfitting meshes in configs here."""
    fitting = trial.row("R7", "mesh shapes that fit: every device used once")
    for fits, case, why in results(check_shapes, counts, log=trial.folder / "log", devices=max(counts)):
        (fitting if fits else trial.rows[0]).check(case, not why, why)
    for spec in wrong_names(trial.random):
        [name] = [name for name in spec if name not in AXES]
        text = refusal(lambda: make_mesh(spec, jax.devices()[:1]))  # noqa: B023
        trial.check(f"axis {name!r}", text is not None and repr(name) in text, text or "accepted")
    for count in counts:
        for shape in itertools.product((1, 3, 8), repeat=3):
            if math.prod(shape) == count:
                continue
            config = default("digits")
            config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape)))
            config.batch = 24
            text = refusal(lambda: validate(config, count))  # noqa: B023
            trial.check(f"config.mesh {shape} on {count}", "config.mesh" in (text or ""), text or "accepted")
