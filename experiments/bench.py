"""Time every structure against dense on this machine: `python -m experiments.bench --suite=cpu`.

Each row is timed beside dense in the same process, call by call in turn, so ratios hold although the machine's speed
drifts. Rows are kept in `--out` as they finish; run again it goes on where it stopped, `--fresh` starts over.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

MALLOC = "glibc.malloc.hugetlb=1"
if __name__ == "__main__" and sys.platform == "linux" and MALLOC not in os.environ.get("GLIBC_TUNABLES", ""):
    # Temporaries above 32 MB are page-faulted afresh at every call otherwise; only read at process start.
    os.environ["GLIBC_TUNABLES"] = MALLOC
    os.execv(sys.executable, [sys.executable, "-m", "experiments.bench", *sys.argv[1:]])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import app  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from experiments import bench_gpu  # noqa: E402
from experiments.own_flags import OwnFlags  # noqa: E402
from experiments.rows import within  # noqa: E402
from structmat.analysis.pages import page_of  # noqa: E402
from structmat.analysis.timing import interleaved, median_ratio, op_counts  # noqa: E402
from structmat.nn.leaves import split  # noqa: E402
from structmat.nn.sites import merge  # noqa: E402
from structmat.structures import FAMILIES, StructureError, parse  # noqa: E402
from structmat.training.record import Record  # noqa: E402

SUITES = {
    "cpu": {"sizes": [256, 512, 1024, 2048, 4096], "batches": [64, 512], "dtype": "float32"},
    "quick": {"sizes": [256], "batches": [64], "dtype": "float32"},
}
"""Named sets of sizes; `quick` is a smoke test of the command."""

CHOSEN = [
    "low_rank(rank={n8})",
    "spectral(rank={n8})",
    "monarch(blocks=4)",
    "monarch(blocks=4, order='blocked')",
    "monarch(blocks=16)",
    "block_tensor_train(rank=1)",
    "block_tensor_train(rank=4)",
    "block_diagonal(blocks=16)",
    "kronecker(terms=1)",
    "kronecker(terms=4)",
    "tensor_train(rank=4, cores=3)",
    "diagonal()",
    "random_sparse(density=0.03)",
    "n_m_sparse(n=2, m=4)",
    "low_rank(rank={n8}) + random_sparse(density=0.03)",
]
CASES = CHOSEN + [
    family.about.example
    for name, family in FAMILIES.items()
    if name != "dense" and not any(c.startswith(f"{name}(") for c in CHOSEN)
]
"""What is timed: the chosen sizes, and of every other family its own example."""

flags = OwnFlags()
_SUITE = flags.DEFINE_enum("suite", "cpu", sorted([*SUITES, "gpu"]), "which sizes; gpu: the kernels on a GPU")
_OUT = flags.DEFINE_string("out", "", "Record JSON to write; default results/bench/<suite>.json, of a GPU h100.json")
_ONLY = flags.DEFINE_string("only", "", "time only structures whose text contains this")
_REPEATS = flags.DEFINE_integer("repeats", 9, "timed calls per row", lower_bound=3)
_MINUTES = flags.DEFINE_float(
    "minutes", None, "stop after this time; run again to go on; default 30, of the GPU suite 8", lower_bound=0.1
)
_FRESH = flags.DEFINE_bool("fresh", False, "forget rows already measured")


def functions(text: str, n: int, dtype):
    """Forward and forward+backward of `text` at n x n: (bound, params, forward, both).

    The second returns the output and the gradients of input and trainable leaves, as a training step needs them.
    """
    bound = parse(text).bind(n, n)
    params = bound.init(jax.random.key(0), dtype)
    leaves = bound.leaves()

    def forward(params, x, g):
        return bound.matmul(params, x)

    def both(params, x, g):
        trained, rest = split(leaves, params, True), split(leaves, params, False)
        y, pull = jax.vjp(lambda t, x: bound.matmul(merge(t, rest), x), trained, x)
        return y, pull(g)

    return bound, params, jax.jit(forward), jax.jit(both)


def measure(text: str, n: int, batch: int, repeats: int, dtype) -> list[dict]:
    """One row per direction: times and FLOPs beside dense."""
    keys = jax.random.split(jax.random.key(1), 2)
    x, g = (jax.random.normal(k, (batch, n), dtype) for k in keys)
    dense, ours = functions("dense()", n, dtype), functions(text, n, dtype)
    reduction = dense[0].cost(batch).flops / max(ours[0].cost(batch).flops, 1)
    rows = []
    for direction, index in (("forward", 2), ("forward+backward", 3)):
        pair = [dense[index], ours[index]]
        args = [(dense[1], x, g), (ours[1], x, g.astype(jnp.complex64) if ours[0].is_complex else g)]
        base, times = interleaved(pair, args, repeats)
        counts = op_counts(ours[index].lower(*args[1]).compile())
        speedup = 1 / median_ratio(times, base)
        rows.append(
            {
                "structure": str(ours[0].structure),
                "label": text,
                "n": n,
                "batch": batch,
                "direction": direction,
                "ms": 1e3 * statistics.median(times),
                "dense_ms": 1e3 * statistics.median(base),
                "spread": (max(times) - min(times)) / statistics.median(times),
                "speedup": speedup,
                "flop_reduction": reduction,
                "efficiency": speedup / reduction,
                "params": ours[0].params,
                "transposes": counts.get("transpose", 0),
                "copies": counts.get("copy", 0),
            }
        )
    return rows


def break_even(rows: list[dict]) -> list[dict]:
    """Per structure, batch and direction: the smallest n from which on it is never slower than dense."""
    out = []
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["batch"], row["direction"]), []).append(row)
    for (case, batch, direction), group in groups.items():
        group = sorted(group, key=lambda r: r["n"])
        faster = [r["n"] for i, r in enumerate(group) if all(s["speedup"] >= 1 for s in group[i:])]
        out.append({"case": case, "batch": batch, "direction": direction, "break_even_n": min(faster, default=None)})
    return out


def timing_table(rows: list[dict], style: box.Box) -> Table:
    """Times and efficiencies; of the sizes from 2048 on, or of all if there are none."""
    names = [
        "structure",
        "n",
        "batch",
        "direction",
        "ms",
        "dense ms",
        "speed-up",
        "FLOPs saved",
        "efficiency",
        "transposes",
    ]
    table = Table(*names, box=style)
    large = [r for r in rows if r["n"] >= 2048] or rows
    for r in sorted(large, key=lambda r: (r["direction"], r["batch"], r["n"])):
        times = [f"{r['ms']:.2f}", f"{r['dense_ms']:.2f}", f"{r['speedup']:.2f}"]
        # A permutation multiplies nothing: there is no rate to speak of.
        none = r["flop_reduction"] > r["n"] ** 2 * r["batch"]
        saved = ["all", "-"] if none else [f"{r['flop_reduction']:.1f}", f"{r['efficiency']:.2f}"]
        saved.append(str(r["transposes"]))
        table.add_row(r["label"], str(r["n"]), str(r["batch"]), r["direction"], *times, *saved)
    return table


def break_even_table(even: list[dict], style: box.Box) -> Table:
    """The smallest n from which a structure is never slower than dense."""
    table = Table("structure", "batch", "direction", "never slower than dense from n =", box=style)
    for e in even:
        found = str(e["break_even_n"] or "not up to the largest n")
        table.add_row(e["case"].replace("{n8}", "n/8"), str(e["batch"]), e["direction"], found)
    return table


def report(record: Record, out: Path) -> None:
    """Print both tables, and write them as Markdown beside the Record."""
    rows, even = record.metrics["rows"], record.metrics["break_even"]
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(timing_table(rows, box.ROUNDED))
    console.print(break_even_table(even, box.ROUNDED))
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 200)
        device, versions = record.device, record.versions
        page.print(
            f"# Products beside dense: {out.stem}\n\n{device['cpu']}, {device['cores']} cores, {device['platform']}, jax "
            f"{versions['jax']}, {record.date}, `{record.command}`. Medians of {record.config['repeats']} calls in turn with "
            "dense; efficiency is speed-up over FLOPs saved; transposes are those of the compiled program.\n",
            soft_wrap=True,
            markup=False,
        )
        page.print(timing_table(rows, box.MARKDOWN))
        page.print(break_even_table(even, box.MARKDOWN))


def main(argv: list[str]) -> None:
    """Measure what is missing, write the Record after every row, print the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    if _SUITE.value == "gpu":
        bench_gpu.main(_OUT.value, _MINUTES.value or 8.0, _ONLY.value, _FRESH.value)
        return
    suite, minutes = SUITES[_SUITE.value], _MINUTES.value or 30.0
    out = Path(_OUT.value or f"results/bench/{_SUITE.value}.json")
    dtype = jnp.dtype(suite["dtype"])
    done: list[dict] = []
    if out.exists() and not _FRESH.value:
        done = json.loads(out.read_text())["metrics"]["rows"]
    known = {(r["case"], r["n"], r["batch"]) for r in done}
    todo = [
        (case, n, batch)
        for n in suite["sizes"]
        for batch in suite["batches"]
        for case in CASES
        if _ONLY.value in case and (case, n, batch) not in known
    ]
    if not todo and not done:
        raise app.UsageError(f"--only={_ONLY.value!r} is in none of: {', '.join(CASES)}")
    start = time.monotonic()
    for i, (case, n, batch) in enumerate(within(todo, minutes)):
        try:
            rows = measure(case.format(n8=n // 8), n, batch, _REPEATS.value, dtype)
        except StructureError as error:
            print(f"left out: {error}")
            continue
        done += [{"case": case} | row for row in rows]
        print(
            f"[{i + 1}/{len(todo)}] n={n} batch={batch} "
            + ", ".join(f"{r['direction']} x{r['speedup']:.2f}" for r in rows)
            + f"  {rows[0]['label']}",
            flush=True,
        )
        record = Record.create(
            name=f"bench_{_SUITE.value}",
            kind="bench",
            config={
                "suite": _SUITE.value,
                "repeats": _REPEATS.value,
                "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
            }
            | suite,
            structures={r["case"]: r["structure"] for r in done},
            seed=0,
            data_hash="",
            seconds=time.monotonic() - start,
            metrics={"rows": done, "break_even": break_even(done)},
        )
        record.write(out)
    report(Record.read(out), out)
    print(f"written: {out}, {out.with_suffix('.md')}")


if __name__ == "__main__":
    flags.run(main)
