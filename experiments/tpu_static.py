"""The TPU compiler's estimates of every kernel beside dense and XLA: `python -m experiments.tpu_static`.

A fixed list of products on TPUs, forward and with all gradients; no TPU needed, and nothing is measured. Rows are
kept in `--out` as they finish; run again it goes on where it stopped, `--fresh` starts over. The rule's choices are
looked up again at every start, so that they are today's.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from absl import app

from experiments.own_flags import OwnFlags
from experiments.products import OPS, Product, bound_of
from experiments.rows import selected, within
from experiments.static_cycles import CLOCKS, DIRECTIONS, IMPLEMENTATIONS, Estimate, analysed, estimate
from experiments.tpu_static_table import LABEL, judged, name_of, report
from pallas_kernels import CHIPS
from structmat.training import environment
from structmat.training.record import Record

TOKENS = 1024
FEWER = 512
"""Tokens of the second try, scaled, where the profiler fails: its time grows with the number of tiles."""

NARROW, WIDE = ("v5e",), ("v6e",)
BOTH = ("v5e", "v6e")
CASES: list[tuple[str, dict[str, float], tuple[int, ...], tuple[str, ...]]] = [
    *[("block_sparse", {"block": 128, "density": d}, (4096,), NARROW) for d in (0.5, 0.25, 0.125, 0.0625)],
    *[("block_sparse", {"block": 256, "density": d}, (4096,), WIDE) for d in (0.5, 0.25, 0.125, 0.0625)],
    ("block_sparse", {"block": 128, "density": 0.25}, (4096,), ("v5p", "v6e")),
    ("block_sparse", {"block": 128, "density": 0.25}, (8192,), NARROW),
    ("monarch", {"blocks": 4}, (4096,), (*BOTH, "v5p")),
    ("monarch", {"blocks": 8}, (4096,), BOTH),
    ("monarch", {"blocks": 16}, (4096,), BOTH),
    ("block_diagonal", {"blocks": 4}, (4096,), BOTH),
    ("block_diagonal", {"blocks": 16}, (4096,), BOTH),
    ("low_rank_plus_block_sparse", {"rank": 128, "block": 128, "density": 0.125}, (4096,), NARROW),
    ("low_rank_plus_block_sparse", {"rank": 128, "block": 256, "density": 0.125}, (4096,), WIDE),
    ("kronecker", {"major": 8, "terms": 1}, (4096,), BOTH),
    ("kronecker", {"major": 32, "terms": 1}, (4096,), BOTH),
    ("low_rank", {"rank": 128}, (4096,), BOTH),
    ("low_rank", {"rank": 512}, (4096,), BOTH),
]
"""(operation, sizes, widths, chips): the shapes of kernels' own tables, blocks as wide as the chip's matrix units."""

flags = OwnFlags()
_OUT = flags.DEFINE_string("out", "results/bench/tpu_static.json", "Record JSON to write, with the .md beside it")
_ONLY = flags.DEFINE_string("only", "", "only rows whose name, such as 'monarch blocks=8, n 4096, v5e, both', has this")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "stop after this time; run again to go on", lower_bound=0.0)
_LIMIT = flags.DEFINE_float("limit", 100.0, "seconds one compile may take", lower_bound=1.0)
_FRESH = flags.DEFINE_bool("fresh", False, "forget rows already estimated, of --only those")


def plan() -> list[dict[str, Any]]:
    """What every row is of: op, sizes, case, n, tokens, chip, direction."""
    return [
        {"op": op, "sizes": sizes, "case": _case(op, sizes), "n": n, "tokens": TOKENS, "chip": chip, "direction": d}
        for op, sizes, widths, chips in CASES
        for n in widths
        for chip in chips
        for d in DIRECTIONS
    ]


def _case(op: str, sizes: dict[str, float]) -> str:
    return f"{op} " + ",".join(f"{k}={v:g}" for k, v in sizes.items())


def with_rule(row: dict[str, Any]) -> dict[str, Any]:
    """row with what the rule says of it, the memory floors in cycles, and the verdict on its cycles."""
    product = Product(row["op"], row["tokens"], row["n"], row["sizes"])
    chip, clock = CHIPS[row["chip"]], CLOCKS[row["chip"]]
    choice = product.choice(chip)
    panel, square = 2 * row["tokens"] * row["n"], 2 * row["n"] ** 2
    dense = 2 * panel + square if row["direction"] == "forward" else 4 * panel + 2 * square
    return judged(
        row
        | {
            "rule": choice.implementation,
            "reason": choice.reason,
            "unsupported": choice.unsupported,
            "flop_reduction": product.dense_flops / product.flops,
            "bound": bound_of(chip, row["n"], row["direction"]),
            "floor": round(product.floor(chip.bandwidth, row["direction"]) * clock),
            "dense_floor": round(dense / chip.bandwidth * clock),
        }
    )


def estimated(row: dict[str, Any], dense: dict[str, Any] | None, limit: float) -> dict[str, Any]:
    """row with the cycles of every implementation, the reason where there are none, notes of the estimate (GEMMs counted
    at the peak rate, kernels taken alone), which are scaled, and which the cost analysis stands in for.

    Args:
      dense: a finished row of the same width, tokens, chip and direction, whose dense cycles are these too.
    """
    product = Product(row["op"], row["tokens"], row["n"], row["sizes"])
    refused = product.choice(CHIPS[row["chip"]]).unsupported
    cycles, why, notes, scaled, costs = {}, {}, {}, [], []
    for name in IMPLEMENTATIONS:
        if name == "dense" and dense:
            cycles[name] = dense["cycles"][name]
            for mine, theirs in ((why, dense["why"]), (notes, dense["notes"])):
                mine |= {name: theirs[name]} if name in theirs else {}
            scaled += [name] if name in dense["scaled"] else []
            continue
        if name == "pallas" and refused:
            found = Estimate(None, refused)
        else:
            found = estimate(product, row["chip"], name, row["direction"], limit)
        if found.cycles is None:
            why[name] = found.why
            if not (name == "pallas" and refused) and not (name == "xla" and OPS[row["op"]].indices):
                fewer = Product(row["op"], FEWER, row["n"], row["sizes"])
                found = estimate(fewer, row["chip"], name, row["direction"], limit)
                if found.cycles is not None:
                    found = dataclasses.replace(found, cycles=found.cycles * row["tokens"] // FEWER)
                    scaled.append(name)
        cycles[name] = found.cycles
        if name == "xla" and found.cycles is None and cycles["dense"] and "dense" not in scaled:
            cycles[name] = _beside_dense(product, row, cycles["dense"], limit)
            costs += [name] * (cycles[name] is not None)
        held = dataclasses.asdict(found)
        if noted := {k: v for k, v in held.items() if v and k not in ("cycles", "why", "parts")}:
            notes[name] = noted
    facts = {"cycles": cycles, "why": why, "notes": notes, "scaled": scaled, "analysed": costs}
    versions = environment.versions()
    return row | facts | {"commit": versions.get("git", ""), "libtpu": versions.get("libtpu", "")}


def _beside_dense(product: Product, row: dict[str, Any], dense: int, limit: float) -> int | None:
    """Cycles of XLA's program where the profiler fails: those of dense, times the ratio of both by XLA's cost analysis."""
    whole, ours = (analysed(product, row["chip"], name, row["direction"], limit) for name in ("dense", "xla"))
    return round(dense * ours / whole) if whole and ours else None


def run(out: Path, minutes: float, only: str, fresh: bool, limit: float) -> list[dict[str, Any]]:
    """Estimate what is missing, write the Record after every row; all rows so far."""
    held = json.loads(out.read_text())["metrics"]["rows"] if out.exists() else []
    asked, planned = selected(plan(), name_of, only), {name_of(r) for r in plan()}
    forgotten = lambda name: name not in planned or (fresh and only in name)
    done = {name_of(r): with_rule(r) for r in held if not forgotten(name_of(r))}
    todo = [r for r in asked if name_of(r) not in done]
    start, same = time.monotonic(), ("n", "tokens", "chip", "direction")
    for i, row in enumerate(within(todo, minutes)):
        dense = next((d for d in done.values() if all(d[k] == row[k] for k in same)), None)
        found = with_rule(estimated(row, dense, limit))
        done[name_of(row)] = found
        cycles = ", ".join(f"{k} {v:,}" if v else f"{k} -" for k, v in found["cycles"].items())
        print(f"[{i + 1}/{len(todo)}] {name_of(row)}: {cycles} ({LABEL}); rule {found['rule']}", flush=True)
        record_of(list(done.values()), time.monotonic() - start).write(out)
    rows = list(done.values())
    if not todo and rows != held:  # the rules have changed
        record_of(rows, 0.0).write(out)
    return rows


def record_of(rows: list[dict[str, Any]], seconds: float) -> Record:
    """The Record of rows, made now."""
    return Record.create(
        name="tpu_static",
        kind="bench",
        config={"label": LABEL, "clocks": CLOCKS, "tokens": TOKENS},
        structures={},
        seed=0,
        data_hash="",
        seconds=seconds,
        metrics={"rows": rows},
    )


def main(argv: list[str]) -> None:
    """Estimate, then print and write the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    out = Path(_OUT.value)
    rows = run(out, _MINUTES.value, _ONLY.value, _FRESH.value, _LIMIT.value)
    if not rows:
        print("no rows yet")
        return
    record = Record.read(out)
    about = (
        f"jax {record.versions['jax']}, libtpu {record.versions.get('libtpu', '(unknown)')}; last call {record.date}, "
        f"`{record.command}`. Thousands of cycles of one device by libtpu's static profile, bf16; "
        "`both` is y and the gradients of x and of every weight. "
        f"Ratios compare max(cycles, memory floor). ~: scaled from {FEWER} tokens, where the profiler failed at {TOKENS}; +: with "
        "parts missing or counted at the peak rate, as the Record notes; ?: the profiler fails, dense times the ratio of both "
        "by XLA's cost analysis. "
        "The bound is n / (2 ridge), docs/kernels.md, and half more for `both`."
    )
    report(rows, out, about)
    print(f"written: {out}, {out.with_suffix('.md')}")


if __name__ == "__main__":
    flags.run(main)
