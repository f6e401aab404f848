"""The GPU suite of `experiments.bench`: the kernels beside XLA, dense cuBLAS and PyTorch, all in one run.

First every kernel's numbers, forward and gradients, at a small size; then times. A time is that of one turn of a compiled
loop of 50 to 1000, each turn of which needs the results of the one before, less a turn of the same loop with nothing in
it; both are medians of several calls. PyTorch is timed between CUDA events round as many replays of a CUDA graph of the
compiled product. A kernel that fails leaves its message in the row and the run goes on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench_torch
from experiments.bench_gpu_table import DIRECTIONS, OURS, rates, report
from experiments.bench_loop import comparison, looped, noted, operands, seconds, worst
from experiments.products import OPS, Product, Sizes
from pallas_kernels.chips import CHIPS, Chip, current_chip
from structmat.training.record import Record


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


def name_of(op: str, sizes: Sizes) -> str:
    """`monarch blocks=8`."""
    return f"{op} " + ",".join(f"{k}={v:g}" for k, v in sizes.items())


def products(suite: Suite) -> Iterator[tuple[str, Product]]:
    """(case, product) in the order of measurement."""
    for n in suite.widths:
        for tokens in suite.tokens:
            for op, sizes in suite.cases:
                if op in OPS:
                    yield name_of(op, sizes), Product(op, tokens, n, sizes)


def measure(product: Product, chip: Chip, suite: Suite, seen: dict[Any, float]) -> list[dict[str, Any]]:
    """The rows of both directions: seconds by implementation, errors, and in `notes` why a column is empty.

    `seen` keeps the seconds of dense, which many products share, by n, tokens and direction.
    """
    choice, (x, g, weights) = product.choice(chip), operands(product)
    exact = OPS[product.op].dense(product.n, *(w if w.dtype == jnp.int32 else w.astype(jnp.float32) for w in weights))
    dense = exact.astype(x.dtype)
    rows = {d: {"direction": d, "seconds": {}, "error": {}, "notes": {}} for d in DIRECTIONS}
    lowered, arguments, repeats = {}, {}, {}
    for direction, times in DIRECTIONS.items():
        least = max(times * product.flops / chip.flops, product.floor(chip.bandwidth, direction)) if chip.flops else 1
        repeats[direction] = int(min(max(0.02 / least, suite.repeats[0]), suite.repeats[1]))
        for name in (*OURS, "dense"):
            function, _ = product.program(name, direction)
            if name == "dense" and (product.n, product.tokens, direction) in seen:
                continue
            held = [x, *([g] if direction == "both" else []), *([dense] if name == "dense" else weights)]
            arguments[direction, name] = held
            with noted(rows[direction], name):
                pair = function, lambda *held: held
                lowered[direction, name] = [jax.jit(looped(f, repeats[direction])).lower(*held) for f in pair]
    for name in OURS:
        with noted(rows["forward"], name):
            lowered["error", name] = [jax.jit(comparison(product, name)).lower(x, g, *weights)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiling = {key: [pool.submit(p.compile) for p in pair] for key, pair in lowered.items()}
    for name in OURS:
        if ("error", name) in compiling:
            with noted(rows["forward"], name):
                [program] = compiling.pop(("error", name))
                for direction, error in worst(program.result()(x, g, *weights)).items():
                    rows[direction]["error"][name] = error
    for (direction, name), pair in compiling.items():
        with noted(rows[direction], name):
            calls = [functools.partial(program.result(), *arguments[direction, name]) for program in pair]
            took = seconds(*calls, repeats[direction], suite.samples)
            work = product.dense_flops if name == "dense" else product.flops
            if chip.flops and took < 0.8 * DIRECTIONS[direction] * work / chip.flops:
                raise RuntimeError(f"{took * 1e6:.2f} us is faster than the chip: the loop did not run")
            rows[direction]["seconds"][name] = took
            if name == "dense":
                seen[product.n, product.tokens, direction] = took
    for direction, row in rows.items():
        if (known := seen.get((product.n, product.tokens, direction))) is not None:
            row["seconds"]["dense"] = known
    _torch(product, rows, [exact, x, g, *weights], repeats, suite.samples)
    for direction, row in rows.items():
        row |= {
            "n": product.n,
            "tokens": product.tokens,
            "flop_reduction": choice.flop_reduction,
            "bound": choice.bound,
        }
        row |= rates(row["seconds"], product, direction, choice.flop_reduction, choice.bound)
    return list(rows.values())


def _torch(product: Product, rows: dict[str, Any], arrays: list[Any], repeats: dict[str, int], samples: int) -> None:
    function, missing = bench_torch.apply(product.op), bench_torch.missing()
    if missing or function is None:
        for row in rows.values():
            row["notes"]["torch"] = missing or f"{product.op} is not written in torch here"
        return
    (exact, x, g, *weights), run = bench_torch.tensors(arrays), bench_torch.compiled(function)
    for direction, row in rows.items():
        with noted(row, "torch"):
            call = bench_torch.both(run, x, g, weights) if direction == "both" else lambda run=run: run(x, *weights)
            row["seconds"]["torch"] = bench_torch.seconds(call, repeats[direction], samples)
    with noted(rows["forward"], "torch"):
        rows["forward"]["error"]["torch"] = bench_torch.error(run(x, *weights), x, exact)
    with noted(rows["forward"], "torch_bsr"):
        for name, (run, operands) in bench_torch.sparse(product.op, x, weights).items():
            with noted(rows["forward"], name):
                took = bench_torch.seconds(lambda r=run, o=operands: r(*o), repeats["forward"], samples)
                rows["forward"]["seconds"][name] = took


def run(out: Path, minutes: float, only: str, fresh: bool, suite: Suite) -> None:
    """Measure what `out` lacks of the cases containing `only`, or all if `fresh`, writing it after every product."""
    start, chip = time.monotonic(), current_chip()
    held = {"numerics": {}, "rows": []}
    if out.exists() and not fresh:
        held = json.loads(out.read_text())["metrics"]
    todo = [(case, p) for case, p in products(suite) if only in case]
    known = {(r["case"], r["n"], r["tokens"]) for r in held["rows"]}
    seen: dict[Any, float] = {}
    late = lambda: time.monotonic() - start > 60 * minutes

    def write() -> None:
        config = {"suite": "gpu", "chip": dataclasses.asdict(chip), "samples": suite.samples, "repeats": suite.repeats}
        elapsed = time.monotonic() - start
        Record.create(
            name="bench_gpu",
            kind="bench",
            config=config,
            structures={},
            seed=0,
            data_hash="",
            seconds=elapsed,
            metrics=held,
        ).write(out)

    for case, product in sorted(todo, key=lambda pair: pair[1].n):
        small = dataclasses.replace(product, tokens=100)
        if case in held["numerics"] or product.choice(chip).unsupported or late():
            continue
        row: dict[str, Any] = {"n": small.n, "tokens": small.tokens, "error": {}, "notes": {}}
        for name in OURS:
            with noted(row, name):
                x, g, weights = operands(small)
                row["error"][name] = worst(jax.jit(comparison(small, name))(x, g, *weights))
        held["numerics"][case] = row
        print(f"numbers of {case}: {row['error']} {row['notes'] or ''}", flush=True)
        write()
    left = [(case, p) for case, p in todo if (case, p.n, p.tokens) not in known]
    for at, (case, product) in enumerate(left):
        if late():
            print(f"stopped after {minutes:g} minutes with {len(left) - at} products to go; run again to go on")
            break
        rows = measure(product, chip, suite, seen)
        held["rows"] += [{"case": case} | row for row in rows]
        said = [", ".join(f"{k} {1e6 * v:.1f} us" for k, v in row["seconds"].items()) for row in rows]
        print(f"[{at + 1}/{len(left)}] {product}: {said[0]} | both: {said[1]} {rows[0]['notes'] or ''}", flush=True)
        write()
    if held["rows"]:
        report(held["rows"], out, " ".join(str(__doc__).split()))


def main(out: str, minutes: float, only: str, fresh: bool) -> None:
    """The suite on this machine's GPU; ends with one sentence where there is none.

    Args:
      out: the Record to write; "" for results/bench/h100.json, or as the GPU is called.

    Raises:
      SystemExit: no GPU, or `only` is in no case.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    chip, suite = current_chip(), Suite()
    if chip.platform != "gpu":
        raise SystemExit(f"error: --suite=gpu needs a GPU that jax sees; here it sees {jax.devices()[0].device_kind!r}")
    cases = [name_of(*case) for case in suite.cases if case[0] in OPS]
    if not any(only in case for case in cases):
        raise SystemExit(f"error: --only={only!r} is in none of: {', '.join(cases)}")
    name = chip.name if chip.name in CHIPS else "gpu"
    run(Path(out or f"results/bench/{name}.json"), minutes, only, fresh, suite)
