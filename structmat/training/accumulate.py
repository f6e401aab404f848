"""Gradient accumulation: the mean of a function over the parts of a batch, with one part in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Metrics = Mapping[str, jax.Array]
Part = Mapping[str, jax.Array]


def mean_over_parts(
    f: Callable[[jax.Array | int, Part], tuple[Any, Metrics]], batch: Part, parts: int
) -> tuple[Any, dict[str, jax.Array]]:
    """What `f` gives for a whole batch, to rounding, from `parts` equal parts of it in turn.

    Part i holds the rows i, i + parts, ...: of a batch spread over devices each one keeps rows of every part, so none is
    sent.

    Args:
      f: (number of the part, part) -> (means over the part's examples, metrics); the means are any pytree of floating
        arrays, such as a loss and its gradients; metrics are scalars, means too, and `count`, the examples behind them.
      batch: name -> (rows, ...).
      parts: divides the rows; 1 is `f(0, batch)`.

    Returns:
      Means and metrics weighted by `count`, and the sum of the counts. A part without examples does not count.
    """
    if parts == 1:
        means, metrics = f(0, batch)
        return means, dict(metrics)
    split = jax.tree.map(lambda a: a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, item: tuple[jax.Array, Part]) -> tuple[Any, None]:
        means, metrics = f(*item)
        count = metrics["count"]
        weigh = lambda t, a: t + jnp.where(count > 0, a * count, 0)
        return (jax.tree.map(weigh, total[0], (means, _others(metrics))), total[1] + count), None

    first = jax.tree.map(lambda a: a[0], split)
    means, metrics = jax.eval_shape(f, jnp.zeros((), jnp.int32), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ((means, _others(metrics)), metrics["count"]))
    (sums, count), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    means, metrics = jax.tree.map(lambda s: s / count, sums)
    return means, metrics | {"count": count}


def _others(metrics: Metrics) -> dict[str, jax.Array]:
    return {name: value for name, value in metrics.items() if name != "count"}
