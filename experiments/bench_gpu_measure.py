"""One product of the GPU benchmark: its numbers, and the times of every implementation."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench_torch
from experiments.bench_gpu_table import DIRECTIONS, OURS, rates
from experiments.bench_loop import comparison, looped, noted, operands, seconds, worst
from experiments.products import OPS, Product, Sizes, bound_of
from pallas_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is measured, the most telling first; `cases` names operations that `experiments.products` has.

    Attributes:
      repeats: turns of a loop, at least and at most. samples: timed calls of it.
    """

    widths: tuple[int, ...] = (4096, 8192, 2048, 1024)
    tokens: tuple[int, ...] = (4096, 16384, 512, 64)
    cases: tuple[tuple[str, Sizes], ...] = (
        ("block_sparse", {"block": 128, "density": 0.25}),
        ("monarch", {"blocks": 8}),
        ("low_rank", {"rank": 128}),
        ("block_sparse", {"block": 128, "density": 0.125}),
        ("monarch", {"blocks": 4}),
        ("monarch", {"blocks": 16}),
        ("low_rank", {"rank": 64}),
        ("low_rank", {"rank": 256}),
        ("block_diagonal", {"blocks": 16}),
        ("kronecker", {"terms": 1, "major": 32}),
        ("low_rank_plus_block_sparse", {"rank": 128, "block": 128, "density": 0.125}),
    )
    repeats: tuple[int, int] = (50, 1000)
    samples: int = 5


def numbers(product: Product) -> dict[str, Any]:
    """Errors of ours against f32, forward and gradients."""
    row: dict[str, Any] = {"n": product.n, "tokens": product.tokens, "error": {}, "notes": {}}
    x, g, weights = operands(product)
    for name in reversed(OURS):
        with noted(row, name):
            row["error"][name] = worst(jax.jit(comparison(product, name))(x, g, *weights))
    return row


def healthy() -> bool:
    """Whether the device still computes: a kernel that goes astray takes the whole context with it."""
    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


def measure(
    product: Product, chip: Chip, suite: Suite, seen: dict[Any, float], without: str = ""
) -> list[dict[str, Any]]:
    """The rows of both directions: seconds by implementation, errors, and in `notes` why a column is empty.

    Args:
      seen: seconds of dense, which many products share, by n, tokens and direction; added to.
      without: why the kernel is left out, or "". It runs last: what it breaks is measured by then.
    """
    choice, (x, g, weights) = product.choice(chip), operands(product)
    exact = OPS[product.op].dense(product.n, *(w if w.dtype == jnp.int32 else w.astype(jnp.float32) for w in weights))
    rows: dict[str, Any] = {d: {"direction": d, "seconds": {}, "error": {}, "notes": {}} for d in DIRECTIONS}
    one = _One(product, chip, suite, rows, x, g, weights, exact.astype(x.dtype))
    shared = [(product.n, product.tokens, d) for d in DIRECTIONS]
    one.time(["xla"] if all(key in seen for key in shared) else ["xla", "dense"])
    for key in shared:
        if key in seen:
            rows[key[2]]["seconds"]["dense"] = seen[key]
        elif "dense" in rows[key[2]]["seconds"]:
            seen[key] = rows[key[2]]["seconds"]["dense"]
    _torch(one, exact)
    if without:
        for row in rows.values():
            row["notes"]["pallas"] = without
    else:
        one.time(["pallas"])
    for direction, row in rows.items():
        row |= {"n": product.n, "tokens": product.tokens}
        bound = bound_of(chip, product.n, direction) if chip.flops else choice.bound
        row |= {"flop_reduction": choice.flop_reduction, "bound": bound}
        row |= rates(row["seconds"], product, direction, choice.flop_reduction, bound)
    return list(rows.values())


@dataclasses.dataclass(frozen=True)
class _One:
    """What is measured of one product, and the rows it goes into."""

    product: Product
    chip: Chip
    suite: Suite
    rows: dict[str, Any]
    x: jax.Array
    g: jax.Array
    weights: list[jax.Array]
    dense: jax.Array

    def repeats(self, direction: str) -> int:
        """Turns of a loop that takes about 20 ms at the chip's best."""
        (low, high), chip = self.suite.repeats, self.chip
        if not chip.flops:
            return low
        least = max(
            DIRECTIONS[direction] * self.product.flops / chip.flops, self.product.floor(chip.bandwidth, direction)
        )
        return int(min(max(0.02 / least, low), high))

    def time(self, names: Iterable[str]) -> None:
        """Errors of ours among `names`, then times of all; programs are compiled side by side."""
        lowered: dict[Any, Any] = {}
        for name in names:
            if name in OURS:
                with noted(self.rows["forward"], name):
                    lowered["error", name] = [
                        jax.jit(comparison(self.product, name)).lower(*self.arguments("both", name))
                    ]
            for direction in DIRECTIONS:
                with noted(self.rows[direction], name):
                    pair = self.product.program(name, direction)[0], lambda *held: held
                    loops = [jax.jit(looped(f, self.repeats(direction))) for f in pair]
                    lowered[direction, name] = [loop.lower(*self.arguments(direction, name)) for loop in loops]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiling = {key: [pool.submit(p.compile) for p in programs] for key, programs in lowered.items()}
        for (direction, name), programs in compiling.items():
            with noted(self.rows["forward" if direction == "error" else direction], name):
                self.run(direction, name, [program.result() for program in programs])

    def run(self, direction: str, name: str, programs: list[Any]) -> None:
        """Run what was compiled: a comparison, or a loop and the same one empty."""
        if direction == "error":
            for found, error in worst(programs[0](*self.arguments("both", name))).items():
                self.rows[found]["error"][name] = error
            return
        calls = [functools.partial(program, *self.arguments(direction, name)) for program in programs]
        took = seconds(*calls, self.repeats(direction), self.suite.samples)
        work = DIRECTIONS[direction] * (self.product.dense_flops if name == "dense" else self.product.flops)
        if self.chip.flops and took < 0.8 * work / self.chip.flops:
            raise RuntimeError(f"{took * 1e6:.2f} us is faster than the chip: the loop did not run")
        self.rows[direction]["seconds"][name] = took

    def arguments(self, direction: str, name: str) -> list[jax.Array]:
        """Of `Product.program`."""
        return [
            self.x,
            *([self.g] if direction == "both" else []),
            *([self.dense] if name == "dense" else self.weights),
        ]


def _torch(one: _One, exact: jax.Array) -> None:
    op, rows, samples = one.product.op, one.rows, one.suite.samples
    function, missing = bench_torch.apply(op), bench_torch.missing()
    if missing or function is None:
        for row in rows.values():
            row["notes"]["torch"] = missing or f"{op} is not written in torch here"
        return
    tensors, run = bench_torch.tensors([exact, one.x, one.g, *one.weights]), bench_torch.compiled(function)
    exact_t, x, g, *weights = tensors
    for direction, row in rows.items():
        with noted(row, "torch"):
            call = bench_torch.both(run, x, g, weights) if direction == "both" else lambda: run(x, *weights)
            row["seconds"]["torch"] = bench_torch.seconds(call, one.repeats(direction), samples)
    with noted(rows["forward"], "torch"):
        rows["forward"]["error"]["torch"] = bench_torch.error(run(x, *weights), x, exact_t)
    for name, prepare in bench_torch.SPARSE.get(op, {}).items():
        with noted(rows["forward"], name):
            operands_t = prepare(x, *weights)
            call = functools.partial(bench_torch.linear, *operands_t)
            rows["forward"]["seconds"][name] = bench_torch.seconds(call, one.repeats("forward"), samples)
    bench_torch.give_back()
