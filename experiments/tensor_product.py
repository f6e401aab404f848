"""Clebsch-Gordan tensor products by CP factors: what they miss and what they cost, `python -m experiments.tensor_product`.

For every degree and rank of `--rows`: the error of the CP factors of the path-summed tensor and how far they are from
equivariant, up to degree `--fit`; and operations and time beside the plain contraction with that tensor, timed in turn with
it. Writes a Record to `--out` and tables with what follows from them beside it. Lin et al. 2025, arXiv 2507.01131.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.own_flags import OwnFlags
from structmat.analysis.pages import page_of
from structmat.analysis.timing import interleaved, median_ratio
from structmat.nn.tensor_product import cp_flops, cp_product, path_flops, path_product, plain_flops, plain_product
from structmat.structures.clebsch_gordan import LARGEST, path_tensor, paths, width
from structmat.structures.cp_format import CPFormat
from structmat.structures.errors import StructureError
from structmat.structures.path_factors import PathFactors
from structmat.training.record import Record

flags = OwnFlags()
_ROWS = flags.DEFINE_list(
    "rows",
    "1:5,1:7,1:8,2:14,2:20,2:28,2:34,3:21,3:63,4:28,4:112,5:35,5:175,6:42,6:252".split(","),
    "degree:rank of each row; the paper's schedules are ranks 7 L and 7 L^2",
)
_FIT = flags.DEFINE_integer("fit", 3, "highest degree whose factors are fitted", lower_bound=0, upper_bound=LARGEST)
_SEPARATE = flags.DEFINE_integer(
    "separate", 4, "highest degree at which paths with weights of their own are timed: one program part per path",
    lower_bound=0, upper_bound=LARGEST,
)  # fmt: skip
_PAIRS = flags.DEFINE_integer("pairs", 4096, "pairs of vectors per timed call", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 20, "timed calls of each function", lower_bound=1)
_ROTATIONS = flags.DEFINE_integer("rotations", 100, "random rotations of the equivariance error", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", "", "Record JSON to write, with the .md beside it; default results/tdn/<backend>.json"
)

CHANNELS = 16
"""Of a timed call: pairs are rows times channels, joined channel by channel (mode uuu)."""
ACCURATE = 1e-2
"""An equivariance error below it counts as kept."""


def parsed(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(degree, rank) of texts such as `2:28`, each once, in ascending order.

    Raises:
      app.UsageError: a text of another form, a degree outside 1..6, or a rank outside those of `CPFormat`.
    """
    found = set()
    for text in texts:
        try:
            lmax, rank = (int(part) for part in text.split(":"))
            if lmax < 1:
                raise ValueError(f"degree {lmax} must be in 1..{LARGEST}")
            CPFormat((width(lmax),) * 3, rank)
        except (ValueError, StructureError) as error:
            raise app.UsageError(f"--rows: {text!r} is not degree:rank, such as 2:28 ({error})") from None
        found.add((lmax, rank))
    if not found:
        raise app.UsageError("--rows is empty: name degree:rank, such as 2:28")
    return sorted(found)


def rotations(key: jax.Array, count: int) -> np.ndarray:
    """Rotations f64 (count, 3, 3), uniform."""
    with jax.enable_x64(True):
        drawn = np.asarray(jax.random.orthogonal(key, 3, (count,), jnp.float64))
    return drawn * np.linalg.det(drawn)[:, None, None]


def measure_fit(lmax: int, rank: int, turns: np.ndarray) -> dict[str, Any]:
    """Errors of the CP factors of this rank under the rotations `turns` (n, 3, 3)."""
    start = time.perf_counter()
    factors = PathFactors.fit(lmax, lmax, lmax, rank)
    seconds = time.perf_counter() - start
    errors = factors.equivariance_errors(turns)
    return {
        "lmax": lmax,
        "rank": rank,
        "error": factors.error(),
        "equivariance": float(np.sqrt(np.mean(errors**2))),
        "equivariance_worst": float(errors.max()),
        "largest_entry": float(max(np.abs(core).max() for core in factors.cores)),
        "seconds": seconds,
    }


def measure_cost(lmax: int, ranks: Sequence[int], pairs: int, repeats: int, separate: bool) -> list[dict[str, Any]]:
    """A row per rank, f32: FLOPs per pair, median ms, and the ratio of times to the plain contraction's in the same run.

    `separate` times the exact product with weights per path too, in a row of rank None.
    """
    rng, d = np.random.default_rng(0), width(lmax)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    rows = -(-pairs // CHANNELS)
    x, y, weights = draw(rows, CHANNELS, d), draw(rows, CHANNELS, d), draw(CHANNELS)
    tensor = jnp.asarray(path_tensor(lmax, lmax, lmax), jnp.float32)
    functions = [jax.jit(lambda m, x, y, w: plain_product(m, x, y, w, "uuu"))]
    arguments: list[tuple[Any, ...]] = [(tensor, x, y, weights)]
    for rank in ranks:
        functions.append(jax.jit(lambda cores, x, y, w: cp_product(cores, x, y, w, "uuu")))
        arguments.append(([draw(d, rank) for _ in range(3)], x, y, weights))
    if separate:
        functions.append(jax.jit(lambda x, y, w: path_product(x, y, w, "uuu", lmax)))
        arguments.append((x, y, draw(len(paths(lmax, lmax, lmax)), CHANNELS)))
    plain, *others = interleaved(functions, arguments, repeats)
    flops = [cp_flops((d, d, d), rank) for rank in ranks] + [path_flops(lmax, lmax, lmax)] * separate
    return [
        {
            "lmax": lmax,
            "rank": rank,
            "flops": own,
            "plain_flops": plain_flops((d, d, d)),
            "nonzero_flops": 3 * int(np.count_nonzero(tensor)),
            "paths": len(paths(lmax, lmax, lmax)),
            "ms": 1e3 * statistics.median(times),
            "plain_ms": 1e3 * statistics.median(plain),
            "flops_ratio": own / plain_flops((d, d, d)),
            "time_ratio": median_ratio(times, plain),
        }
        for rank, own, times in zip([*ranks, *[None] * separate], flops, others)
    ]


def verdicts(fits: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[str]:
    """What the rows say, in sentences."""
    said = []
    products = [c for c in costs if c["rank"] is not None]
    for lmax in sorted({f["lmax"] for f in fits}):
        own = sorted((f for f in fits if f["lmax"] == lmax), key=lambda f: f["rank"])
        falls = all(b["equivariance"] <= a["equivariance"] for a, b in itertools.pairwise(own))
        ranks = ", ".join(str(f["rank"]) for f in own)
        if len(own) > 1:
            said.append(
                f"L = {lmax}: the equivariance error {'falls' if falls else 'does NOT fall'} over ranks {ranks}."
            )
        kept = next((f for f in own if f["equivariance"] < ACCURATE), None)
        if kept is None:
            least = min(f["equivariance"] for f in own)
            said.append(
                f"L = {lmax}: no rank of {ranks} brings the equivariance error below {ACCURATE:.0%}; least {least:.1%}."
            )
            continue
        cost = next((c for c in products if (c["lmax"], c["rank"]) == (lmax, kept["rank"])), None)
        if cost:
            said.append(
                f"L = {lmax}: rank {kept['rank']}, the first below {ACCURATE:.0%}, takes {cost['flops_ratio']:.2f} times the "
                f"FLOPs and {cost['time_ratio']:.2f} times the time of the plain contraction: it "
                f"{'pays' if cost['time_ratio'] < 1 else 'does not pay'}."
            )
    if fits:
        ratio = max((f["equivariance_worst"] / f["error"] for f in fits if f["error"] > 1e-12), default=0.0)
        said.append(
            f"The worst equivariance error is {ratio:.2f} times the fit error of the same rank; the bound is 2"
            + ("." if ratio <= 2 + 1e-9 else ", which is EXCEEDED.")
        )
    for what, key in (("FLOPs", "flops_ratio"), ("time", "time_ratio")):
        shown: dict[bool, list[str]] = {True: [], False: []}
        for c in products:
            shown[c[key] < 1].append(f"L = {c['lmax']} rank {c['rank']} ({c[key]:.2f})")
        less, more = (", ".join(shown[pays]) or "no row" for pays in (True, False))
        said.append(f"CP takes less {what} than the plain contraction at {less}, and does not at {more}.")
    beaten = [f"L = {c['lmax']} rank {c['rank']}" for c in products if c["flops"] >= c["nonzero_flops"]]
    said.append(
        f"The exact sum over the tensor's non-zeros alone (3 FLOPs each) has no more FLOPs than CP at {len(beaten)} of "
        f"{len(products)} rows" + (f": {', '.join(beaten)}." if beaten else ".")
    )
    separate = [c for c in costs if c["rank"] is None]
    if separate:
        ratios = ", ".join(f"{c['time_ratio']:.2f} at L = {c['lmax']}" for c in separate)
        said.append(f"Weights per path take, in times of the plain contraction with shared weights, {ratios}.")
    return said


def table(fits: list[dict[str, Any]], costs: list[dict[str, Any]], style: box.Box) -> Table:
    """One line per degree and rank."""
    made = Table("L", "paths", "rank", "fit error", "equivariance error", "worst", "FLOPs per pair", "of plain",
                 "of non-zeros", "ms", "plain ms", "time of plain", box=style)  # fmt: skip
    for column in made.columns:
        column.justify = "right"
    fitted = {(f["lmax"], f["rank"]): f for f in fits}
    for c in costs:
        fit = fitted.get((c["lmax"], c["rank"]))
        errors = [f"{fit[name]:.2g}" for name in ("error", "equivariance", "equivariance_worst")] if fit else ["-"] * 3
        made.add_row(
            str(c["lmax"]),
            str(c["paths"]),
            "per path" if c["rank"] is None else str(c["rank"]),
            *errors,
            f"{c['flops']:,}",
            f"{c['flops_ratio']:.2f}",
            f"{c['flops'] / c['nonzero_flops']:.2f}",
            f"{c['ms']:.2f}",
            f"{c['plain_ms']:.2f}",
            f"{c['time_ratio']:.2f}",
        )
    return made


def report(record: Record, out: Path) -> None:
    """Print the table and the verdicts, and write them as Markdown beside the Record."""
    fits, costs, config = record.metrics["fits"], record.metrics["costs"], record.config
    said = verdicts(fits, costs)
    about = (
        f"{record.device['cpu']}, {record.device['cores']} cores, {record.device['platform']}, jax {record.versions['jax']}, "
        f"{record.date}, `{record.command}`. All degrees up to L on both inputs and the output; one weight per channel, shared "
        "by all paths, which have norm 1. Fit error: |CP - M| / |M| after alternating least squares in f64; a dash where no "
        f"factors were fitted. Equivariance error: RMS over normal inputs and {config['rotations']} random rotations, relative to "
        "the output, and the worst rotation's. FLOPs: 2 per multiply-add. Times: forward, f32, "
        f"{config['pairs']} pairs of vectors in {CHANNELS} channels, medians of {config['repeats']} calls in turn with the plain "
        "contraction (one GEMM of all products of entries); `per path` is the exact product with weights of their own."
    )
    Console(width=None if sys.stdout.isatty() else 200).print(table(fits, costs, box.ROUNDED))
    print("\n".join(said))
    with out.with_suffix(".md").open("w") as file:
        page = page_of(file, 250)
        page.print(f"# Tensor products by CP factors\n\n{about}\n", soft_wrap=True, markup=False)
        page.print(table(fits, costs, box.MARKDOWN))
        page.print("\n" + "\n".join(f"- {line}" for line in said), soft_wrap=True, markup=False)


def main(argv: list[str]) -> None:
    """Measure, write, print."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    rows, start = parsed(_ROWS.value), time.perf_counter()
    out = Path(_OUT.value or f"results/tdn/{jax.default_backend()}.json")
    costs: list[dict[str, Any]] = []
    for lmax in dict.fromkeys(l for l, _ in rows):
        ranks = [rank for l, rank in rows if l == lmax]
        costs += measure_cost(lmax, ranks, _PAIRS.value, _REPEATS.value, lmax <= _SEPARATE.value)
        print(f"L = {lmax}: timed", flush=True)
    turns, fits = rotations(jax.random.key(1), _ROTATIONS.value), []
    for lmax, rank in rows:
        if lmax <= _FIT.value:
            fits.append(measure_fit(lmax, rank, turns))
            print("  ".join(f"{k} {v:.4g}" for k, v in fits[-1].items()), flush=True)
    record = Record.create(
        name="tensor_product",
        kind="bench",
        config={
            "rows": [f"{lmax}:{rank}" for lmax, rank in rows],
            "fit": _FIT.value,
            "separate": _SEPARATE.value,
            "pairs": _PAIRS.value,
            "repeats": _REPEATS.value,
            "rotations": _ROTATIONS.value,
        },
        structures={f"L = {lmax}, R = {rank}": f"cp(rank={rank})" for lmax, rank in rows},
        seed=0,
        data_hash="",
        seconds=time.perf_counter() - start,
        metrics={"fits": fits, "costs": costs},
    )
    record.write(out)
    report(record, out)
    print(f"written: {out}, {out.with_suffix('.md')}")


if __name__ == "__main__":
    flags.run(main)
