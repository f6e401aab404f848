"""Times and errors of a product on an accelerator, for the GPU benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.products import OPS, Product


def looped(function: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    """`repeats` calls in a loop, the first entry of every argument being written anew from the results of the last one.

    The entries keep their values, which the compiler cannot know: nothing of the call can be taken out of the loop.
    """

    def run(*arguments: jax.Array) -> Any:
        def turn(_: Any, held: Any) -> Any:
            results = lax.optimization_barrier(function(*held))
            total = sum(_first(r).astype(jnp.float32) for r in jax.tree.leaves(results))
            same = lambda a: jnp.where(total > 1e38, jnp.zeros((), a.dtype), _first(a))
            return tuple(a.at[(0,) * a.ndim].set(same(a)) for a in held)

        return [_first(a) for a in lax.fori_loop(0, repeats, turn, arguments)]

    return run


def _first(a: jax.Array) -> jax.Array:
    return a[(0,) * a.ndim]


def seconds(compiled: Callable[..., Any], empty: Callable[..., Any], repeats: int, samples: int) -> float:
    """Per turn of a compiled loop () -> results, less those of an `empty` one: the difference of medians of `samples`."""

    def timed(run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return (timed(compiled) - timed(empty)) / repeats


def errors(product: Product, implementation: str) -> dict[str, float]:
    """Largest error over the largest entry, of y (`forward`) and of the worst gradient too (`both`), against f32."""
    x, weights = product.arrays()
    (g, _), op = product.arrays(seed=1), OPS[product.op]
    floats = [i for i in range(len(weights)) if i not in op.indices]
    filled = lambda held: [held[floats.index(i)] if i in floats else w for i, w in enumerate(weights)]

    def reference(x: jax.Array, *held: jax.Array) -> jax.Array:
        return jnp.dot(x, op.dense(product.n, *filled(held)), precision="highest")

    apply = lambda x, *held: op.apply(x, *filled(held), implementation=implementation)

    @jax.jit
    def compared(x: jax.Array, g: jax.Array, *held: jax.Array) -> Any:
        wide = [a.astype(jnp.float32) for a in (x, *held)]
        (y, pull), (want, pull_want) = jax.vjp(apply, x, *held), jax.vjp(reference, *wide)
        pairs = [(y, want), *zip(pull(g), pull_want(g.astype(jnp.float32)))]
        return [jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in pairs]

    y, *slopes = map(float, compared(x, g, *(weights[i] for i in floats)))
    return {"forward": y, "both": max(y, *slopes)}


class noted:
    """Keeps the first line of what went wrong in a row, under the name of the column, and goes on."""

    def __init__(self, row: dict[str, Any], name: str) -> None:
        self.row, self.name = row, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.row["notes"][self.name] = (str(error).strip().splitlines() or [kind.__name__])[0][:300]
        return isinstance(error, Exception)
