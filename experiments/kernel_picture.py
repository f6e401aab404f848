"""Where structures break even with dense: `python -m experiments.kernel_picture` draws docs/images/kernels.png.

From `results/bench/tpu_static.json` (compiler's estimates) and, where it is there, `results/bench/h100.json`
(measurements): speed-up over dense against density, blocks or rank, one colour per chip, the chip's bound dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app

from experiments.own_flags import OwnFlags
from experiments.products import bound_of, parse_options
from experiments.tpu_static_table import LABEL
from pallas_kernels import CHIPS
from structmat.analysis.plots import speedups
from structmat.training.record import Record

AXES = {
    "block_sparse": "density",
    "monarch": "blocks",
    "block_diagonal": "blocks",
    "kronecker": "major",
    "low_rank": "rank",
}
"""The size along the axis of every operation's panel."""

flags = OwnFlags()
_STATIC = flags.DEFINE_string("static", "results/bench/tpu_static.json", "compiler's estimates")
_GPU = flags.DEFINE_string("gpu", "results/bench/h100.json", "measurements, used where the file is there")
_OUT = flags.DEFINE_string("out", "docs/images/kernels.png", "picture to write")
_N = flags.DEFINE_integer("n", 4096, "width of the products")

Curves = dict[str, dict[str, list[tuple[float, float]]]]


def curves(rows: Sequence[dict[str, Any]], n: int, direction: str) -> Curves:
    """Panel -> chip -> points (size, speed-up over dense), of the most tokens there are; the best of several blocks."""
    best: dict[tuple[str, str], dict[float, tuple[int, float]]] = {}
    for r in rows:
        op, _, options = r["case"].partition(" ")
        if op not in AXES or (r["n"], r["direction"]) != (n, direction) or not r.get("speedup"):
            continue
        sizes = parse_options(options)
        if sizes.get("terms", 1) != 1 or AXES[op] not in sizes:
            continue
        points = best.setdefault((f"{op}: {AXES[op]}", r["chip"]), {})
        at, found = sizes[AXES[op]], (r["tokens"], r["speedup"])
        points[at] = max(points.get(at, found), found)
    made: Curves = {}
    for (panel, chip), points in best.items():
        made.setdefault(panel, {})[chip] = sorted((at, gain) for at, (_, gain) in points.items())
    return {panel: made[panel] for op, axis in AXES.items() if (panel := f"{op}: {axis}") in made}


def draw(static: Path, gpu: Path, out: Path, n: int) -> Path:
    """Write the picture.

    Raises:
      UsageError: neither file has a product of width n.
    """
    rows = Record.read(static).metrics["rows"] if static.exists() else []
    if gpu.exists():
        rows = rows + [{"chip": gpu.stem} | r for r in Record.read(gpu).metrics["rows"]]
    grid = {d: found for d in ("forward", "both") if (found := curves(rows, n, d))}
    if not grid:
        raise app.UsageError(f"no speed-up over dense at n={n} in {static} or {gpu}; run experiments.tpu_static first")
    chips = {chip for found in grid.values() for panel in found.values() for chip in panel}
    bounds = {d: {c: bound_of(CHIPS[c], n, d) for c in sorted(chips)} for d in grid}
    title = f"Speed-up over dense, n = {n}, bf16. TPUs: {LABEL}" + ("; GPUs: measured" if gpu.exists() else "")
    figure = speedups(grid, bounds, f"{title}. Dashed: the bound")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    return out


def main(argv: list[str]) -> None:
    """Draw."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    print(f"written: {draw(Path(_STATIC.value), Path(_GPU.value), Path(_OUT.value), _N.value)}")


if __name__ == "__main__":
    flags.run(main)
