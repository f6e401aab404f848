"""What a task is to the loop: a model, a loss and data, all pure functions."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from structmat.nn import Site, choose_path, sites
from structmat.nn.method import Lesson
from structmat.structures import StructureError, parse
from structmat.structures.algebra import trains
from structmat.structures.convolution import has_factors, view_of

Batch = Mapping[str, Any]
Variables = Mapping[str, Any]
Loss = Callable[[nn.Module, Variables, Batch, "jax.Array | None", bool], tuple[jax.Array, dict[str, jax.Array]]]
VIEWED = "viewed"
"""Collection of the frozen leaves of a method's view, where the loss is not that of the view alone."""
TEACHER = "teacher"
"""Collection of a teacher's variables among those that train a model."""
BATCH_STATS = "batch_stats"
"""Flax's collection of the running statistics of batch normalisation; of a training loss, the metric with the new ones."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that another learns from: its module, whose variables the state has, and what is learned."""

    model: nn.Module
    lesson: Lesson


@dataclasses.dataclass(frozen=True)
class Source:
    """Loaded data.

    Attributes:
      batch: (step, rows) -> numpy arrays; `rows` is the range of the whole batch wanted here, None is all of it.
      heldout: () -> the held-out batches, in a fixed order.
      sha256: of the content; two runs compare only where it is equal.
      description: one line for people.
      reference: what a method without a model reaches, by metric name.
    """

    batch: Callable[[int, range | None], dict[str, np.ndarray]]
    heldout: Callable[[], Iterator[dict[str, np.ndarray]]]
    sha256: str
    description: str
    reference: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to train on something.

    Attributes:
      model: its module, with structures assigned.
      base: the dense module the learning rate was tuned on (muP).
      example: shapes of one call's positional arguments.
      batch: shapes of one whole batch.
      loss: (model, variables, batch, rng, train) -> (mean loss, metrics); metrics hold `count`, the number of examples
        behind the means, and in training BATCH_STATS where the model has any. `rng` is None where `train` is False.
      metric: the name of the held-out figure quoted first.
      unit: what throughput and FLOPs are counted in; `units` per batch.
      other_flops: FLOPs of a forward pass per unit outside the sites (attention products).
      load: reads the data; nothing before it touches any.
      rows: (site path) -> rows it multiplies in one batch; None where all multiply `units`.
      accumulate: parts of a batch whose gradients are computed in turn.
      generated: version of the code that makes the data out of `config.data` alone; "" where data is read from elsewhere,
        so that only its content tells what it is.
      logits: whether the model's output is f32 logits `(..., classes)` and the loss their mean cross-entropy.
      teacher: what the model learns from beside the data, from a switch on; None where from nothing.
      full_pass: whether a view learns from the whole model, which is trained too: see structmat.nn.method.Method.
    """

    name: str
    model: nn.Module
    base: nn.Module
    example: tuple[jax.ShapeDtypeStruct, ...]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    loss: Loss
    metric: str
    unit: str
    units: int
    other_flops: int
    load: Callable[[], Source]
    rows: Callable[[str], int] | None = None
    accumulate: int = 1
    generated: str = ""
    logits: bool = False
    teacher: Teacher | None = None
    full_pass: bool = False

    @functools.cached_property
    def table(self) -> dict[str, Site]:
        """The sites of the model; do not change it."""
        return sites(self.model, *self.example)

    def with_model(self, model: nn.Module) -> Task:
        """The task with another module of the same interface."""
        return dataclasses.replace(self, model=model)

    @functools.cached_property
    def params(self) -> int:
        """Real parameters of the whole model, frozen ones included: a complex entry is two; an index, a mask or a running
        statistic is none."""
        shapes = dict(jax.eval_shape(self.model.init, jax.random.key(0), *self.example))
        shapes.pop(BATCH_STATS, None)
        floats = [leaf for leaf in jax.tree.leaves(shapes) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return sum(leaf.size * (1 + jnp.iscomplexobj(leaf)) for leaf in floats)

    @functools.cached_property
    def trains(self) -> bool:
        """Whether any parameter of the model is differentiated; all may be frozen, or their structures have none."""
        if any(trains(site.bound) for site in self.table.values()):
            return True
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *self.example)
        return bool(jax.tree.leaves(shapes.get("params", {})))

    def flops(self, executed: bool = False) -> int:
        """FLOPs of one forward pass per unit: products and attention.

        Args:
          executed: count each product on the path it takes, not by its structure's algorithm.
        """
        total = self.other_flops
        for name, site in self.table.items():
            if site.kind != "embed" or getattr(self.model, "tie", False):
                rows = self.rows_at(name)
                cost = site.bound.cost(rows, path=self.path_at(name)) if executed else None
                one_call = cost.flops_executed if cost else rows * site.bound.cost(1).flops
                total += self.accumulate * one_call // self.units
        return total

    def step_flops(self, executed: bool = False) -> int:
        """FLOPs of a training step per unit: a backward pass is two forward ones, a teacher has none, and with `full_pass`
        there are two of both."""
        taught = 0 if self.teacher is None else self.with_model(self.teacher.model).flops(executed)
        return 3 * (1 + self.full_pass) * self.flops(executed) + taught

    def rows_at(self, path: str) -> int:
        """Rows that one call of the site multiplies."""
        return (self.rows(path) if self.rows else self.units) // self.accumulate

    def path_at(self, path: str) -> str:
        """`factored` or `dense`: how the site multiplies them."""
        site = self.table[path]
        viewed = view_of(site.bound.in_shape, site.bound.out_shape) if site.kind == "conv" else None
        if viewed and not has_factors(site.bound, viewed[0]):
            return "dense"
        return choose_path(site.bound, self.rows_at(path))[0]

    @property
    def path(self) -> str:
        """How a step computes its structured products: factored, dense (materialised first) or mixed."""
        linear = {p: s for p, s in self.table.items() if s.kind in ("linear", "conv")}
        paths = {self.path_at(p) for p, s in linear.items() if s.bound.structure.name != "dense"}
        return "mixed" if len(paths) > 1 else next(iter(paths), "dense")


def dump_table(table: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
    """The site table as JSON: layer path -> canonical structure text, kind, in_shape, out_shape."""
    return {
        path: {
            "structure": str(site.bound.structure),
            "kind": site.kind,
            "in_shape": list(site.bound.in_shape),
            "out_shape": list(site.bound.out_shape),
        }
        for path, site in table.items()
    }


def dump_tables(task: Task) -> dict[str, Any]:
    """What a checkpoint says of the model: `sites`, and those of its `teacher` where it has one."""
    tables = {"sites": dump_table(task.table)}
    if task.teacher is not None:
        tables["teacher"] = dump_table(sites(task.teacher.model, *task.example))
    return tables


def with_table(task: Task, stored: Mapping[str, Mapping[str, Any]]) -> Task:
    """The task with the structures of a stored table in place of what the config's rules chose.

    Raises:
      StructureError: the model has other sites or sizes than the table; names the first.
    """
    structures = tuple((path, parse(row["structure"])) for path, row in stored.items())
    task = task.with_model(task.model.clone(structures=structures))
    found = json.loads(json.dumps(dump_table(task.table)))
    for path in [*stored, *(p for p in found if p not in stored)]:
        if dict(stored.get(path, {})) != found.get(path):
            raise StructureError(
                f"site {path}: the checkpoint has {dict(stored.get(path, {})) or 'no such site'}, "
                f"the model {found.get(path, 'no such site')}"
            )
    return task


def mean_metrics(parts: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over batches weighted by each one's `count`; in float64, so that the order of batches hardly matters."""
    counts = np.array([float(p["count"]) for p in parts])
    return {
        name: float(np.dot([float(p[name]) for p in parts], counts) / counts.sum())
        for name in parts[0]
        if name != "count"
    }
