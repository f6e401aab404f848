"""The GPU suite of `experiments.bench`: the kernels beside XLA, dense cuBLAS and PyTorch, all in one run.

First every kernel's numbers, forward and gradients, at a small size; then times. A time is that of one turn of a compiled
loop of 50 to 1000, each turn of which needs the results of the one before, less a turn of the same loop with nothing in
it; both are medians of several calls. PyTorch is timed between CUDA events round as many replays of a CUDA graph of the
compiled product. A kernel that fails leaves its message in the row and the run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.bench_gpu_measure import Suite, healthy, measure, numbers
from experiments.bench_gpu_table import DIRECTIONS, report
from experiments.products import OPS, Product, Sizes
from pallas_kernels.chips import CHIPS, current_chip
from structmat.training.record import Record

TOLERANCE = 0.05
"""Error from which on a kernel is not timed; bfloat16 alone gives some thousandths."""
LIMIT = 150.0
"""Seconds one product may take, compilation included."""


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


def run(out: Path, minutes: float, only: str, fresh: bool, suite: Suite) -> None:
    """Measure what `out` lacks of the cases containing `only`, or all if `fresh`, writing it after every product.

    What is being run is written first: if it takes the process with it, the next run notes that and goes past it.
    """
    start, chip = time.monotonic(), current_chip()
    held: dict[str, Any] = {"numerics": {}, "rows": [], "begun": None}
    if out.exists() and not fresh:
        held = json.loads(out.read_text())["metrics"]
    todo = [(case, p) for case, p in products(suite) if only in case]
    late = lambda: time.monotonic() - start > 60 * minutes

    def write(begun: Any) -> None:
        held["begun"] = begun
        config = {"suite": "gpu", "chip": dataclasses.asdict(chip), "samples": suite.samples, "repeats": suite.repeats}
        facts = {"structures": {}, "seed": 0, "data_hash": "", "seconds": time.monotonic() - start}
        Record.create(name="bench_gpu", kind="bench", config=config, metrics=held, **facts).write(out)

    if held["begun"]:
        _note_lost(held)
        write(None)
    for case, product in sorted(todo, key=lambda pair: pair[1].n):
        if case in held["numerics"] or product.choice(chip).unsupported or late():
            continue
        write([case, 0, 0])
        with _within(LIMIT, f"the numbers of {case}"):
            held["numerics"][case] = row = numbers(dataclasses.replace(product, tokens=100))
        print(f"numbers of {case}: {row['error']} {row['notes'] or ''}", flush=True)
        write(None)
        if not healthy():
            raise SystemExit(LOST.format(case))
    known = {(r["case"], r["n"], r["tokens"]) for r in held["rows"]}
    left = [(case, p) for case, p in todo if (case, p.n, p.tokens) not in known]
    dense: dict[Any, float] = {}
    for at, (case, product) in enumerate(left):
        if late():
            print(f"stopped after {minutes:g} minutes with {len(left) - at} products to go; run again to go on")
            break
        write([case, product.n, product.tokens])
        with _within(LIMIT, str(product)):
            rows = measure(product, chip, suite, dense, _why_not(held["numerics"].get(case)))
        held["rows"] += [{"case": case} | row for row in rows]
        said = [", ".join(f"{k} {1e6 * v:.1f} us" for k, v in row["seconds"].items()) for row in rows]
        print(f"[{at + 1}/{len(left)}] {product}: {said[0]} | both: {said[1]} {rows[0]['notes'] or ''}", flush=True)
        write(None)
        if not healthy():
            raise SystemExit(LOST.format(product))
    if held["rows"]:
        report(held["rows"], out, " ".join(str(__doc__).split()))


LOST = "error: the GPU does not answer any more after {}; its row says why, run again to go on with the next"


@contextlib.contextmanager
def _within(limit: float, what: str) -> Iterator[None]:
    """End the process where a kernel never ends: nothing else gets past it."""

    def give_up() -> None:
        print(f"error: {what} took more than {limit:g} s; run again to go on with the next", flush=True)
        os._exit(3)

    timer = threading.Timer(limit, give_up)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _why_not(row: dict[str, Any] | None) -> str:
    """Why a kernel is not timed, from the row of its numbers, or ""."""
    if row is None:
        return ""
    if "pallas" not in row["error"]:
        return f"not timed: {row['notes'].get('pallas', 'its numbers could not be had')}"
    wrong = row["error"]["pallas"]["both"]
    return "" if wrong < TOLERANCE else f"not timed: its numbers are wrong by {wrong:.1e}"


def _note_lost(held: dict[str, Any]) -> None:
    """What the last run had begun and not finished is done, and its row says so."""
    (case, n, tokens), notes = held["begun"], {"pallas": "the process ended while it ran"}
    if not n:
        held["numerics"][case] = {"error": {}, "notes": notes}
        return
    facts = {
        "n": n,
        "tokens": tokens,
        "seconds": {},
        "error": {},
        "notes": notes,
        "flop_reduction": None,
        "bound": None,
    }
    held["rows"] += [{"case": case, "direction": direction} | facts for direction in DIRECTIONS]


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
