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


def operands(product: Product, seed: int = 0) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """x, the cotangent of y and the weights, drawn where they are used: on the host the largest take seconds."""
    op, key = OPS[product.op], jax.random.key(seed)
    shapes = product.weights()
    deep = op.weight(product.n, product.sizes) / product.n / (len(shapes) - len(op.indices))

    def draw(at: int, w: jax.ShapeDtypeStruct) -> jax.Array:
        if at not in op.indices:
            return (jax.random.normal(jax.random.fold_in(key, at), w.shape) * deep**-0.5).astype(w.dtype)
        order = jax.random.uniform(jax.random.fold_in(key, at), (w.shape[0], product.n // int(product.sizes["block"])))
        return jnp.sort(jnp.argsort(order)[:, : w.shape[1]]).astype(w.dtype)

    @jax.jit
    def drawn() -> Any:
        panel = lambda at: jax.random.normal(jax.random.fold_in(key, at), (product.tokens, product.n), jnp.bfloat16)
        return panel(100), panel(101), [draw(at, w) for at, w in enumerate(shapes)]

    return drawn()


def comparison(product: Product, implementation: str) -> Callable[..., list[jax.Array]]:
    """(x, g, *weights) -> the largest error over the largest entry of y and of each gradient, against f32."""
    op = OPS[product.op]

    def compared(x: jax.Array, g: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        floats = [i for i in range(len(weights)) if i not in op.indices]
        filled = lambda held: [held[floats.index(i)] if i in floats else w for i, w in enumerate(weights)]
        apply = lambda x, *held: op.apply(x, *filled(held), implementation=implementation)
        exact = lambda x, *held: jnp.dot(x, op.dense(product.n, *filled(held)), precision="highest")
        given = [x, *(weights[i] for i in floats)]
        y, pull = jax.vjp(apply, *given)
        want, pull_want = jax.vjp(exact, *(a.astype(jnp.float32) for a in given))
        pairs = [(y, want), *zip(pull(g), pull_want(g.astype(jnp.float32)))]
        return [jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in pairs]

    return compared


def worst(found: list[jax.Array]) -> dict[str, float]:
    """Of a comparison: the error of y (`forward`), and that of the worst of y and the gradients (`both`)."""
    y, *slopes = map(float, found)
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
