"""Flow on the torus: from the vorticity at `data.start` to that at `data.time`, by an operator on a periodic grid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.analysis.fields import relative_h1, relative_l2
from structmat.data.batches import shuffled_indices
from structmat.data.corpus import content_hash
from structmat.data.errors import DataError
from structmat.data.pde import FieldSet, NavierStokes, navier_stokes_set
from structmat.data.pde.steps import steps_between
from structmat.structures.errors import suggest
from structmat.structures.fft import by_rows
from structmat.training.applied import applied, with_auxiliary
from structmat.training.errors import ConfigError
from structmat.training.task import Batch, Source, Task, Variables
from structmat.training.tasks.operator_models import MODELS

NORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"l2": relative_l2, "h1": relative_h1}
"""What the distance of two fields may be, relative to the second: one number for each row."""


def defaults(model: str = "fno") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            seed=0,  # of the initial fields
            resolution=32,  # points a side
            solve_resolution=0,  # of the solver, of which `resolution` keeps every so many; 0 is the finest that is kept
            fine=0,  # points a side of a second, finer grid to evaluate on, a multiple of `resolution`; 0 is none
            viscosity=1e-3,
            start=0.0,  # time of the inputs, a divisor of `time`; 0 is the random fields themselves
            time=8.0,  # of the outputs
            dt=1e-3,  # of the solver
            train=240,  # samples
            test=60,  # samples held out, the same for any number of others
            folder="",  # where solutions are kept; '' is pde in $STRUCTMAT_CACHE, or the user's cache folder
            loss="l2",  # l2 | h1: the norm of the relative error that is trained
        ),
    )


def check(config: Any) -> None:
    """Refuse grids, times and sizes no solver or model of this task can have."""
    d, choice = config.data, MODELS[config.model.name]
    for name, least in (
        ("seed", 0),
        ("resolution", 4),
        ("solve_resolution", 0),
        ("fine", 0),
        ("train", 1),
        ("test", 1),
    ):
        if d[name] < least:
            raise ConfigError(f"data.{name}", d[name], f"must be at least {least}", f"{least} is")
    for name, good in (("viscosity", 1e-3), ("time", 8.0), ("dt", 1e-3)):
        if d[name] <= 0:
            raise ConfigError(f"data.{name}", d[name], "must be above 0", f"{good} is")
    if d.seed >= 2**31:
        raise ConfigError("data.seed", d.seed, "must be below 2147483648")
    if d.fine and (d.fine % d.resolution or d.fine == d.resolution):
        rule, near = f"must be 0 or a multiple of data.resolution={d.resolution}", 2 * d.resolution
        raise ConfigError("data.fine", d.fine, rule, f"{near} is")
    if d.fine and not choice.any_grid:
        raise ConfigError("data.fine", d.fine, f"a {config.model.name} is bound to the grid it trains on", "0 is valid")
    if d.solve_resolution % _finest(d):
        rule = f"must be 0 or a multiple of the finest grid that is kept, {_finest(d)}"
        raise ConfigError("data.solve_resolution", d.solve_resolution, rule, f"{2 * _finest(d)} is")
    if d.start and not (0 < d.start < d.time and np.isclose(d.time / d.start % 1, (0, 1), rtol=0, atol=1e-6).any()):
        rule = f"must be 0, or the time of a snapshot on the way to data.time={d.time:g}: a divisor of it"
        raise ConfigError("data.start", d.start, rule, f"{d.time / 2:g} is")
    try:
        steps_between(d.time, d.dt, round(d.time / d.start) if d.start else 1)
    except DataError as error:
        raise ConfigError("data.dt", d.dt, str(error)) from None
    if d.loss not in NORMS:
        raise ConfigError("data.loss", d.loss, "no such norm" + suggest(d.loss, NORMS))
    choice.check(config)


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    choice, n = MODELS[config.model.name], config.data.resolution
    x = jax.ShapeDtypeStruct((config.batch, n, n, 1), jnp.float32)
    rows = choice.rows(config)
    return Task(
        name="navier_stokes",
        model=choice.build(config),
        base=choice.base(config),
        example=(x,),
        batch={"x": x, "y": jax.ShapeDtypeStruct((config.batch, n, n), jnp.float32)},
        loss=functools.partial(loss, config.data.loss),
        metric="l2",
        unit="field",
        units=config.batch,
        other_flops=choice.other_flops(config),
        load=lambda: load(config),
        rows=lambda path: config.batch * rows(path),
        generated=f"{NavierStokes.kind} {NavierStokes.version}",
    )


def loss(
    norm: str, model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over fields of the relative error in one of NORMS; metrics have it in all of them, and as `l2_fine` that on the
    finer grid where the batch has one. Fields whose target is NaN do not count."""
    out, extra = applied(model, variables, batch["x"], rng, train)
    errors, count = mean_errors(out, batch["y"])
    if "x_fine" in batch:
        fine, _ = applied(model, variables, batch["x_fine"], rng, train)
        errors["l2_fine"] = mean_errors(fine, batch["y_fine"])[0]["l2"]
    return with_auxiliary(errors[norm], {"loss": errors[norm], **errors, "count": count}, extra)


def mean_errors(out: jax.Array, truth: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """(norm -> mean error, number of fields that count) of out `(batch, n, n, 1)` against truth `(batch, n, n)`."""
    here = jnp.isfinite(truth).all((1, 2))
    pairs = jnp.stack([out[..., 0], jnp.where(here[:, None, None], truth, 1)], 1)
    count = here.sum().astype(jnp.float32)
    each = {name: by_rows(lambda p, f=f: f(p[:, 0], p[:, 1]), pairs) for name, f in NORMS.items()}
    return {name: jnp.where(here, error, 0).sum() / count for name, error in each.items()}, count


def load(config: Any) -> Source:
    """Solve, or read what was solved, and split: the first `data.test` samples are held out.

    Inputs, and outputs, are divided by the root mean square of all those to train on, on the grid that is trained on. The
    checksum is of that grid too: a finer one to evaluate on leaves it.

    Raises:
      DataError: a damaged file, or solutions that are not finite, as dt is too large for the flow.
    """
    d = config.data
    solved = solutions(d)
    own = solved.at(d.resolution)
    scale = scales(own, d.test)
    x, y = _scaled(own.inputs, own.outputs, scale)
    digest = content_hash(x[d.test :], y[d.test :], x[: d.test], y[: d.test])
    test = {"x": x[: d.test], "y": y[: d.test]}
    if d.fine:
        test["x_fine"], test["y_fine"] = _scaled(solved.inputs[: d.test], solved.outputs[: d.test], scale)
    x, y = x[d.test :], y[d.test :]

    def batch(step: int, rows: range | None = None) -> dict[str, np.ndarray]:
        index = shuffled_indices(len(x), config.seed, step, config.batch, rows)
        return {"x": x[index], "y": y[index]}

    error = lambda guess: float(relative_l2(guess, test["y"]).mean())
    return Source(
        batch=batch,
        heldout=lambda: _heldout(test, config.batch, config.eval.batches or None),
        sha256=digest,
        description=f"{own.description}, {d.test} held out",
        reference={"mean_field": error(y.mean(0)), "zero": 1.0},
    )


def solutions(d: Any) -> FieldSet:
    """All samples of `config.data`, held-out ones first, on the finest grid that is kept."""
    return trajectories(d, d.test + d.train, _finest(d))


def trajectories(d: Any, samples: int, resolution: int, later: int = 1) -> FieldSet:
    """The first samples of `config.data`: inputs at `data.start`, outputs at 1 .. `later` times the way from there to
    `data.time`."""
    way = d.time - d.start
    snapshots = round((d.start + later * way) / d.start) if d.start else later
    options = dict(solve_resolution=d.solve_resolution or _finest(d), folder=d.folder or None)
    solved = navier_stokes_set(
        d.seed, samples, resolution, d.viscosity, d.start + later * way, d.dt, snapshots, **options
    )
    if not d.start:
        return solved
    every = round(way / d.start)
    inputs, outputs = solved.outputs[:, 0], solved.outputs[:, every::every]
    said = f"{solved.description}, from time {d.start:g}"
    parts = dict(inputs=inputs, outputs=outputs, times=solved.times[every::every])
    return dataclasses.replace(solved, **parts, sha256=content_hash(inputs, outputs), description=said)


def scales(own: FieldSet, test: int) -> list[np.float64]:
    """What inputs and outputs are multiplied by for the model: see `load`.

    Args:
      own: on the grid that is trained on. test: samples at its start that are held out.
    """
    return [1 / np.sqrt(np.mean(a[test:] ** 2, dtype=np.float64)) for a in (own.inputs, own.outputs)]


def _finest(d: Any) -> int:
    """Points a side of the finest grid that is kept."""
    return d.fine or d.resolution


def _scaled(inputs: np.ndarray, outputs: np.ndarray, scale: list[np.float64]) -> tuple[np.ndarray, np.ndarray]:
    """float32 (samples, n, n, 1) and (samples, n, n)."""
    return (inputs[..., None] * scale[0]).astype(np.float32), (outputs[:, 0] * scale[1]).astype(np.float32)


def _heldout(test: dict[str, np.ndarray], batch: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Batches in order, the last filled up with fields whose target is NaN."""
    for number, start in enumerate(range(0, len(test["x"]), batch)):
        if number == limit:
            return
        parts = {name: a[start : start + batch] for name, a in test.items()}
        short = batch - len(parts["x"])
        fill = {name: np.nan if name.startswith("y") else 0.0 for name in parts}
        yield {
            name: np.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1)), constant_values=fill[name])
            for name, a in parts.items()
        }
