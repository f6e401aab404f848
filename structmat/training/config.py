"""Every field of a run's config, its default, and what makes it valid; checked before data is read or code compiled."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from structmat.models.stack import POLICIES
from structmat.nn import assign
from structmat.optim import OPTIMIZERS, SCHEDULES, SGD, drops
from structmat.parallel import MeshError
from structmat.parallel.mesh import mesh_shape
from structmat.structures import StructureError
from structmat.structures.errors import nearest, suggest
from structmat.training.errors import ConfigError
from structmat.training.methods import hook, method_of, rule_for
from structmat.training.state import abstract_variables
from structmat.training.switch import refuse_rule, stages
from structmat.training.task import BATCH_STATS, Task
from structmat.training.tasks import TASKS

DTYPES = ("float32", "bfloat16")
FREE = ("mesh", "accumulate", "checkpoint", "log_every", "max_skips", "profile")
"""Fields a resumed run may change; all others decide what is learned."""
LATER = {
    "data": {"shift": 0, "rotation": 0.0, "start": 0.0, "crop": 0, "flip": False, "smoothing": 0.0},
    "optim": {"drops": "0.5, 0.75"},
    "eval": {"recalibrate": 0},
}
"""Fields that came after runs were stored by their content, with the value at which a run is as it was before."""


def default(task: str = "lm", model: str | None = None) -> ConfigDict:
    """The config of a task with every field at its default; `model` is one of the task's MODELS, default its first.

    Examples:
      >>> config = default("digits")
      >>> config.model.name, config.structure
      ('mlp', 'dense()')
    """
    return ConfigDict(
        dict(
            task=task,  # what to learn: see structmat.training.tasks
            seed=0,  # of initialisation, data order and dropout
            steps=600,
            batch=16,  # examples per step over all devices
            accumulate=1,  # parts of a batch whose gradients are computed in turn, so that one part's activations fit
            structure="dense()",  # one structure for all linear sites, or 'regex -> structure; regex -> structure'
            switch="",  # other structures for some sites midway, 'when: rules; when: rules': see structmat.training.switch
            method="",  # what else happens to the weights: see structmat.training.methods; '' is nothing
            optim=dict(
                name="adamw",
                lr=4e-3,  # peak rate, tuned for the dense model of mup.base_width
                schedule="cosine",
                drops="0.5, 0.75",  # fractions of the run at which schedule 'steps' divides the rate by ten
                warmup=0.1,  # steps, or a fraction of the run if below 1
                weight_decay=0.1,  # on matrices only; decoupled, but for sgd
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                clip=1.0,  # global gradient norm; 0 is off
            ),
            mup=dict(
                enabled=True,  # structure-aware learning rates, so that `lr` carries over to any structure and width
                base_width=128,  # width of the dense model `lr` was tuned on
            ),
            mesh=dict(replica=1, data=-1, fsdp=1, tensor=1),  # devices per axis; -1 is what is left
            eval=dict(
                every=0,  # steps between evaluations on held-out data; 0 is only at the end
                batches=0,  # held-out batches to use; 0 is all
                recalibrate=0,  # training batches whose statistics replace those of batch normalisation after the last step
            ),
            checkpoint=dict(every=200, keep=2),  # steps between saves; newest saves kept
            max_skips=10,  # stop after this many non-finite steps in a row
            log_every=10,  # steps between rows of metrics
            profile="",  # 'start:stop': write a profiler trace of these steps into the workdir
            **TASKS[task].defaults(model or next(iter(TASKS[task].MODELS))),
        )
    )


def named(choices: Mapping[str, Any], arg: str | None, file: str) -> Any:
    """The entry of a config file's table that its argument names, as in `configs/llama.py:60m`.

    Raises:
      ValueError: no argument, or no such entry.
    """
    if arg is None:
        raise ValueError(f"{file} needs an argument, such as {file}:{next(iter(choices))}; valid: {', '.join(choices)}")
    if arg not in choices:
        raise ValueError(f"{file}:{arg}: no {arg!r} there" + suggest(arg, choices))
    return choices[arg]


def validate(config: ConfigDict, devices: int | None = None) -> Task:
    """Check every field and choose a structure for every site.

    Args:
      devices: how many the mesh must use; default all there are.

    Returns:
      The task with its model's structures resolved. No data was read and nothing compiled.

    Raises:
      ConfigError: the first invalid field, with value, rule and a valid choice.

    Examples:
      >>> config = default("digits")
      >>> config.optim.warmup = 600
      >>> validate(config, devices=1)
      Traceback (most recent call last):
          ...
      structmat.training.errors.ConfigError: config.optim.warmup = 600.0: must be below steps=600; 0.05 is a twentieth of the run
    """
    name = config.get("task", None)
    if name not in TASKS:
        raise ConfigError("task", name, "unknown task" + suggest(str(name), TASKS))
    task = TASKS[name]
    _check_fields(config.to_dict(), _wanted(config, task.MODELS), "")
    _check_ranges(config)
    _check_optim(config)
    method = method_of(config)
    task.check(config)
    _check_mesh(config, jax.device_count() if devices is None else devices)
    full_pass = method is not None and method.full_pass
    built = dataclasses.replace(task.build(config), accumulate=config.accumulate, full_pass=full_pass)
    try:
        built = built.with_model(assign(built.model, config.structure, *built.example))
        built.table  # noqa: B018  traces the model, which refuses what its layers cannot hold, such as a complex product
    except StructureError as error:
        raise ConfigError("structure", config.structure, str(error)) from None
    if not built.trains:
        raise ConfigError("structure", config.structure, "leaves the model nothing to train", "'dense()' trains")
    refuse_rule(config, rule_for(config, built.table))
    _check_logits(config, built)
    _check_recalibrate(config, built)
    for name in ("view", "penalty", "link", "teacher"):
        hook(config, name, built.table)
    stages(config, built)
    return built


def _wanted(config: ConfigDict, models: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the config's task and model, with those of the model's optional fields that the config has."""
    model = _model_name(config, models)
    wanted = default(config.task, model).to_dict()
    if model is not None:
        wanted["model"] |= {k: v for k, v in models[model].optional.items() if k in config.model}
    return wanted


def _model_name(config: ConfigDict, models: Mapping[str, Any]) -> str | None:
    """The model the other fields belong to; None where `model` is no group of fields, which their check then tells."""
    model = config.get("model", None)
    if not isinstance(model, ConfigDict):
        return None
    if "name" not in model:
        known = {key for other in models for key in default(config.task, other).model}
        for key in (key for key in model if key not in known):
            raise ConfigError(f"model.{key}", model[key], "no such field" + suggest(key, ["name"]))
        raise ConfigError("model.name", None, "this field is missing", f"the default is {next(iter(models))!r}")
    if not isinstance(model.name, str):
        raise ConfigError("model.name", model.name, "must be of type str", f"the default is {next(iter(models))!r}")
    if model.name not in models:
        raise ConfigError("model.name", model.name, f"no model of task {config.task!r}" + suggest(model.name, models))
    return model.name


def _check_fields(given: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> None:
    """Same keys and types as the default; an int may stand for a float."""
    for key, value in given.items():
        if key not in wanted:
            raise ConfigError(prefix + key, value, "no such field" + suggest(key, wanted))
    for key, sample in wanted.items():
        if key not in given:
            raise ConfigError(prefix + key, None, "this field is missing", f"the default is {sample!r}")
        value = given[key]
        if isinstance(sample, Mapping) and isinstance(value, Mapping):
            _check_fields(value, sample, f"{prefix}{key}.")
        elif type(value) is not type(sample) and not (type(sample) is float and type(value) is int):
            shown = type(sample).__name__
            raise ConfigError(prefix + key, value, f"must be of type {shown}", f"the default is {sample!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(prefix + key, value, "must be finite", f"the default is {sample!r}")


def _check_ranges(config: ConfigDict) -> None:
    if not 0 <= config.seed < 2**31:
        raise ConfigError("seed", config.seed, "must be in 0 .. 2147483647", f"{config.seed % 2**31} is")
    for field in (
        "steps",
        "batch",
        "accumulate",
        "max_skips",
        "log_every",
        "checkpoint.every",
        "checkpoint.keep",
        "mup.base_width",
    ):
        _at_least(config, field, 1)
    for field in ("eval.every", "eval.batches", "eval.recalibrate"):
        _at_least(config, field, 0)
    if config.steps >= 2**31:
        raise ConfigError("steps", config.steps, "must be below 2147483648")
    if not 0 <= config.model.get("dropout", 0.0) < 1:
        raise ConfigError("model.dropout", config.model.dropout, "must be in [0, 1)", "0.1 is common")
    if config.model.get("dtype", DTYPES[0]) not in DTYPES:
        raise ConfigError(
            "model.dtype", config.model.dtype, "no such compute dtype" + suggest(config.model.dtype, DTYPES)
        )
    if config.model.get("remat", "none") not in POLICIES:
        raise ConfigError("model.remat", config.model.remat, "no such policy" + suggest(config.model.remat, POLICIES))
    if config.profile:
        profile_steps(config)


def profile_steps(config: ConfigDict) -> tuple[int, int]:
    """(start, stop) of `config.profile`; raises ConfigError unless 0 <= start < stop <= steps."""
    start, colon, stop = config.profile.partition(":")
    if colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= config.steps:
        return int(start), int(stop)
    example = f"{min(10, config.steps - 1)}:{min(20, config.steps)}"
    raise ConfigError(
        "profile", config.profile, f"must be 'start:stop' with start < stop <= {config.steps}", f"{example!r} is"
    )


def _at_least(config: ConfigDict, field: str, low: int) -> None:
    value: Any = config
    for part in field.split("."):
        value = value[part]
    if value < low:
        raise ConfigError(field, value, f"must be at least {low}", f"{low} is")


def _check_optim(config: ConfigDict) -> None:
    spec = config.optim
    for field, valid in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if spec[field] not in valid:
            raise ConfigError(f"optim.{field}", spec[field], f"unknown {field}" + suggest(spec[field], valid))
    if spec.name in SGD and config.mup.enabled:
        raise ConfigError(
            "mup.enabled",
            True,
            f"does not go with optim.name={spec.name!r}, whose steps grow with the gradient",
            "False does",
        )
    try:
        drops(spec.drops)
    except ValueError as error:
        raise ConfigError("optim.drops", spec.drops, str(error)) from None
    for field, fits, rule, good in (
        ("lr", spec.lr > 0, "must be above 0", 1e-3),
        ("eps", spec.eps > 0, "must be above 0", 1e-8),
        ("warmup", spec.warmup >= 0, "must be at least 0", 0),
        ("weight_decay", spec.weight_decay >= 0, "must be at least 0", 0),
        ("clip", spec.clip >= 0, "must be at least 0", 1.0),
        ("b1", 0 <= spec.b1 < 1, "must be in [0, 1)", 0.9),
        ("b2", 0 <= spec.b2 < 1, "must be in [0, 1)", 0.95),
    ):
        if not fits:
            raise ConfigError(f"optim.{field}", spec[field], rule, f"{good} is")
    if spec.warmup >= 1 and spec.warmup != int(spec.warmup):
        raise ConfigError(
            "optim.warmup", spec.warmup, "must be whole steps, or a fraction below 1", f"{int(spec.warmup)} is"
        )
    if spec.warmup >= config.steps:
        raise ConfigError(
            "optim.warmup", spec.warmup, f"must be below steps={config.steps}", "0.05 is a twentieth of the run"
        )


def _check_logits(config: ConfigDict, task: Task) -> None:
    method = method_of(config)
    if method is not None and (method.has_teacher or method.full_pass) and not task.logits:
        valid = [name for name, module in TASKS.items() if module.build(default(name)).logits]
        raise ConfigError(
            "method",
            config.method,
            f"compares the logits of two models, and those of task {config.task!r} put out none",
            f"tasks {', '.join(valid)} have logits",
        )


def _check_recalibrate(config: ConfigDict, task: Task) -> None:
    if config.eval.recalibrate and BATCH_STATS not in abstract_variables(task):
        images = TASKS["images"]
        have = lambda name: BATCH_STATS in abstract_variables(images.build(default("images", name)))
        raise ConfigError(
            "eval.recalibrate",
            config.eval.recalibrate,
            "this model has no batch normalisation",
            f"0 is for such; of task 'images' {', '.join(filter(have, images.MODELS))} have it",
        )


def _check_mesh(config: ConfigDict, devices: int) -> None:
    try:
        replica, data, fsdp, _ = mesh_shape(config.mesh.to_dict(), devices)
    except MeshError as error:
        raise ConfigError("mesh", config.mesh.to_dict(), str(error)) from None
    what = "mesh " + "replica x " * (replica > 1) + "data x fsdp" + " x accumulate" * (config.accumulate > 1)
    if config.batch % (parts := replica * data * fsdp * config.accumulate):
        valid = nearest(config.batch, range(parts, config.batch + 2 * parts, parts), 2)
        raise ConfigError("batch", config.batch, f"must be divisible by {what} = {parts}", f"nearest: {valid}")


def identity(config: ConfigDict, rule: Any = None) -> dict[str, Any]:
    """What makes two runs the same run, as JSON: the config without FREE fields, LATER ones where they change nothing, the
    method spelt out, and the Rule."""
    kept = {k: v for k, v in config.to_dict().items() if k not in FREE} | {"method": str(method_of(config) or "")}
    for group, later in LATER.items():
        if group in kept:
            kept[group] = {k: v for k, v in kept[group].items() if k not in later or v != later[k]}
    return json.loads(json.dumps(kept | {"rule": repr(rule) if rule is not None else ""}))


def completed(config: ConfigDict) -> ConfigDict:
    """A copy of a config stored before there were LATER fields, with these as they then were."""
    own = config.copy_and_resolve_references()
    now = default(own.task, own.model.name)
    for group, later in LATER.items():
        for field in later:
            if field in now.get(group, {}) and field not in own[group]:
                own[group][field] = later[field]
    return own


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested dicts differ."""
    for key in dict.fromkeys([*new, *old]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, a, b
