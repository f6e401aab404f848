"""A model applied in training or evaluation, with what is added to the loss of its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from structmat.nn import AUXILIARY
from structmat.nn.method import Outputs
from structmat.nn.sites import layer_paths
from structmat.training.task import BATCH_STATS, TEACHER, VIEWED, Teacher, Variables

CAPTURED = "intermediates"
"""Flax's collection of what modules put out."""
WRITTEN = (AUXILIARY, BATCH_STATS)
"""Collections a model writes in training."""


@dataclasses.dataclass(frozen=True)
class Taught:
    """A model with its teacher, in the place of the model where a loss is to have the teacher's terms; its variables have
    those of the teacher as the collection TEACHER."""

    model: nn.Module
    teacher: Teacher


@dataclasses.dataclass(frozen=True)
class Twice:
    """A model with a view of itself, whose frozen leaves are the collection VIEWED: the view learns from the whole."""

    model: nn.Module


def applied(
    model: nn.Module | Taught | Twice, variables: Variables, inputs: jax.Array, rng: jax.Array | None, train: bool
) -> tuple[Any, dict[str, jax.Array]]:
    """(output, name -> what is added to the loss): in training `auxiliary`, the sum of the terms of the model's structures
    where there are any, the terms of its teacher's lesson, and `viewed`, the mean cross-entropy of a view's logits in nats with
    the softmax of the whole model's as the target; beside these, the new running statistics as BATCH_STATS, where
    the model has any.

    Args:
      rng: of dropout, which a teacher has none of; None where `train` is False.
    """
    if not train:
        return model.apply(variables, inputs, False), {}
    if isinstance(model, Twice):
        own = {name: held for name, held in variables.items() if name != VIEWED}
        out, extra = applied(model.model, own, inputs, rng, train)
        seen, _ = applied(model.model, {**own, "frozen": variables[VIEWED]}, inputs, rng, train)
        target = jax.lax.stop_gradient(jax.nn.softmax(out))
        return out, extra | {"viewed": optax.softmax_cross_entropy(seen, target).mean()}
    if not isinstance(model, Taught):
        out, sown = model.apply(variables, inputs, True, rngs={"dropout": rng}, mutable=WRITTEN)
        return out, _written(sown)
    lesson = model.teacher.lesson
    own = {name: held for name, held in variables.items() if name != TEACHER}
    found, sown = with_outputs(model.model, own, lesson.modules, inputs, True, rngs={"dropout": rng}, mutable=WRITTEN)
    taught, _ = with_outputs(model.teacher.model, variables[TEACHER], lesson.modules, inputs, False)
    return found[0], _written(sown) | lesson.terms(found, taught)


def with_outputs(
    model: nn.Module,
    variables: Variables,
    modules: Collection[str],
    *args: Any,
    mutable: Collection[str] = (),
    **rest: Any,
) -> tuple[Outputs, Mapping[str, Any]]:
    """`model.apply` with the outputs of some modules, of scanned layers too.

    Args:
      modules: layer paths, such as `layers_0/mlp`.

    Returns:
      (output, layer path -> output of the module), and the collections `mutable`.
    """
    heard = lambda module, method: (
        method == "__call__" and not set(modules).isdisjoint(layer_paths("/".join(module.path)))
    )
    out, sown = model.apply(
        variables, *args, capture_intermediates=heard if modules else False, mutable=[*mutable, CAPTURED], **rest
    )
    outputs: dict[str, jax.Array] = {}
    for path, (held,) in flatten_dict(sown.get(CAPTURED, {}), sep="/").items():
        layers = layer_paths(path.removesuffix("/__call__"))
        outputs |= {layer: held[i] if len(layers) > 1 else held for i, layer in enumerate(layers) if layer in modules}
    return (out, outputs), {name: held for name, held in sown.items() if name != CAPTURED}


def with_auxiliary(
    value: jax.Array, metrics: dict[str, jax.Array], terms: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
    """The loss with what is added to it, and metrics that have it apart; `terms` as `applied` gives them."""
    for name, term in terms.items():
        value = value if name == BATCH_STATS else value + term
    return value, {**metrics, **terms}


def _written(sown: Mapping[str, Any]) -> dict[str, Any]:
    terms, statistics = jax.tree.leaves(sown.get(AUXILIARY, {})), sown.get(BATCH_STATS, {})
    found: dict[str, Any] = {"auxiliary": sum(jnp.sum(term) for term in terms)} if terms else {}
    return found | ({BATCH_STATS: statistics} if statistics else {})
