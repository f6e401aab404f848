"""Projections beside other libraries: `python -m experiments.projection`, and exact beside randomised SVDs with `--svd`.

The table measures errors in double precision on both sides, so that a ratio is not rounding; a row fails where ours exceeds
the reference's by more than 1e-5 of it, and then the command fails. What single precision reaches is beside it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from threadpoolctl import threadpool_limits

from experiments.own_flags import OwnFlags
from experiments.projection_report import TOLERANCE, report
from structmat.structures import FAMILIES, Bound, parse, project, svd_method
from structmat.structures.linalg import truncated_svd
from structmat.training import environment
from structmat.training.record import Record

try:
    from experiments.projection_references import ROWS, Row
except ModuleNotFoundError as error:
    sys.exit(f"the references need {error.name}, which comes with the tests: pip install -e '.[test]'")

FLOOR = 1e-12
"""Relative errors below it are rounding, in double precision, and count as equal."""
SINGLE_FLOOR = 1e-6
"""The same for single precision."""
NOTES = {
    False: f"Errors are |w - M| / |w| in double precision on both sides; those below {FLOOR} count as equal. Times are "
    "medians over the matrices and calls in double precision, BLAS on one thread, ours after compilation.",
    True: "One call each after compilation, in single precision, BLAS on one thread.",
}
SIZES = {"cpu": (128, 192), "quick": (16, 24)}
SVD_SIZES = {"cpu": (1024, 2048, 4096), "quick": (256,)}

flags = OwnFlags()
_QUICK = flags.DEFINE_bool("quick", False, "small sizes and two matrices: a smoke test")
_SVD = flags.DEFINE_bool("svd", False, "time randomised SVDs beside exact ones instead of the table")
_ONLY = flags.DEFINE_string(
    "only", "", "only structures whose text contains this; other rows of --out, each with its commit, are kept"
)
_OUT = flags.DEFINE_string("out", "", "Record JSON to write; default results/projection/<backend>[_svd][_quick].json")
_REPEATS = flags.DEFINE_integer(
    "repeats", 3, "timed calls per row; one where a call takes over a second", lower_bound=1
)


def matrices(n: int, m: int) -> dict[str, np.ndarray]:
    """What is projected, in double precision."""
    rng, k = np.random.default_rng(0), min(n, m)
    i, j = np.arange(n)[:, None], np.arange(m)
    left, right = (np.linalg.qr(rng.normal(size=(d, k)))[0] for d in (n, m))
    return {
        "normal": rng.normal(size=(n, m)),
        "heavy-tailed columns": rng.normal(size=(n, m)) * np.exp(rng.normal(size=m)),
        "AR(1)": 0.5 ** np.abs(i - j),
        "Hilbert": 1.0 / (i + j + 1),
        "graded spectrum": (left * np.logspace(0, -6, k)) @ right.T,
    }


def timed(act: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What `act` returns and the median of its seconds; one call if it takes over a second."""
    seconds = []
    while len(seconds) < repeats and sum(seconds) < 1:
        start = time.perf_counter()
        found = jax.block_until_ready(act())
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds)


def relative(w: np.ndarray, found: Any) -> float:
    """|w - found| / |w| in Frobenius norm."""
    return float(np.linalg.norm(w - np.asarray(found)) / np.linalg.norm(w))


def widened(leaf: jax.Array) -> jax.Array:
    """Floating leaves in double precision."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float64)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def measure(row: Row, sizes: tuple[int, int], names: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row of the table per matrix, BLAS on one thread."""
    n, m = sizes[0], sizes[0] if row.square else sizes[1]
    text = row.text.format(r=max(2, n // 16), k=n // 4)
    bound = parse(text).bind(n, m)
    compiled: dict[Any, float] = {}

    def ours(w: np.ndarray, dtype: Any) -> tuple[float, float]:
        w = jnp.asarray(w, dtype)
        call = lambda: project(w, text, key=jax.random.key(0)).params
        if dtype not in compiled:
            first = timed(call, 1)[1]
            compiled[dtype] = max(0.0, first - timed(call, 1)[1])
        params, seconds = timed(call, repeats)
        return relative(np.asarray(w), bound.materialize(jax.tree.map(widened, params))), seconds

    rows = []
    with jax.enable_x64(True), threadpool_limits(1, user_api="blas"):
        for name in names:
            w = matrices(n, m)[name]
            error, seconds = ours(w, jnp.float64)
            single, _ = ours(w, jnp.float32)
            rows.append(
                {
                    "label": text,
                    "commit": environment.versions().get("git", ""),
                    "structure": str(bound.structure),
                    "matrix": name,
                    "shape": [n, m],
                    "error": error,
                    "error_f32": single,
                    "ms": 1e3 * seconds,
                    "compile_ms": 1e3 * compiled[jnp.float64],
                    "reference": row.name,
                }
            )
            if row.reference:
                rows[-1] |= compare(row, w, bound, error, single, seconds, repeats)
    return rows


def compare(
    row: Row, w: np.ndarray, bound: Bound, error: float, single: float, seconds: float, repeats: int
) -> dict[str, Any]:
    """The reference's half of a row, and the ratios."""
    matrix, other = timed(lambda: row.reference(w, bound), repeats)
    reference = relative(w, matrix)
    ratio = max(error, FLOOR) / max(reference, FLOOR)
    return {
        "reference_error": reference,
        "reference_ms": 1e3 * other,
        "ratio": ratio,
        "ratio_f32": max(single, SINGLE_FLOOR) / max(reference, SINGLE_FLOOR),
        "time_ratio": seconds / other,
        "ok": ratio <= 1 + TOLERANCE,
    }


def measure_svd(n: int) -> Iterator[dict[str, Any]]:
    """Exact and randomised truncated SVD of n x n matrices, one call each after compilation."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)).astype(np.float32))[0] for _ in range(2))
    normal = rng.normal(size=(n, n)).astype(np.float32)
    spectra = {
        "flat (normal)": normal,
        "heavy-tailed columns": normal * np.exp(rng.normal(size=n)).astype(np.float32),
        "1/sqrt(k)": (left * np.arange(1, n + 1, dtype=np.float32) ** -0.5) @ right.T,
    }

    def run(w: np.ndarray, rank: int) -> tuple[Any, float]:
        call = jax.jit(lambda w: truncated_svd(w, rank)).lower(w).compile()
        with threadpool_limits(1, user_api="blas"):
            return timed(lambda: call(w), 1)

    for name, w in spectra.items():
        (_, singular, _), exact = run(w, n)
        tails = np.sqrt(np.cumsum(np.asarray(singular, np.float64)[::-1] ** 2)[::-1])
        for rank in (n // 128, n // 32):
            for iterations in (2, 4, 6):
                with svd_method("randomized", iterations=iterations):
                    (u, s, vt), seconds = run(w, rank)
                error = float(np.linalg.norm((w - np.asarray((u * s) @ vt)).astype(np.float64)))
                yield {
                    "n": n,
                    "spectrum": name,
                    "rank": rank,
                    "iterations": iterations,
                    "excess": error / tails[rank] - 1,
                    "exact_ms": 1e3 * exact,
                    "ms": 1e3 * seconds,
                    "speedup": exact / seconds,
                }


def main(argv: list[str]) -> None:
    """Measure, write the Record after every structure, print the tables; fails where a ratio does."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options start with --")
    size = "quick" if _QUICK.value else "cpu"
    stem = jax.default_backend() + "_svd" * _SVD.value + "_quick" * _QUICK.value
    out = Path(_OUT.value or f"results/projection/{stem}.json")
    chosen = [r for r in ROWS if _ONLY.value in r.text]
    if not chosen:
        raise app.UsageError(f"--only={_ONLY.value!r} is in none of: {', '.join(r.text for r in ROWS)}")
    names = list(matrices(4, 4))[: 2 if _QUICK.value else None]
    repeats, start = _REPEATS.value, time.monotonic()
    if _SVD.value:
        parts = (measure_svd(n) for n in SVD_SIZES[size])
    else:
        parts = (measure(row, SIZES[size], names, repeats) for row in chosen)
    rows = Record.read(out).metrics["rows"] if _ONLY.value and out.exists() else []
    for part in parts:
        for found in part:
            print(
                "  ".join(
                    f"{v:.4g}" if isinstance(v, float) else str(v)
                    for k, v in found.items()
                    if k not in ("structure", "commit")
                ),
                flush=True,
            )
            rows = merged(rows, found)
        record = Record.create(
            name=f"projection_{stem}",
            kind="bench",
            config={
                "note": NOTES[_SVD.value],
                "svd": _SVD.value,
                "quick": _QUICK.value,
                "repeats": repeats,
                "sizes": (SVD_SIZES if _SVD.value else SIZES)[size],
            },
            structures={r["label"]: r["structure"] for r in rows if "label" in r},
            seed=0,
            data_hash="",
            seconds=time.monotonic() - start,
            metrics={"rows": rows},
        )
        record.write(out)
    report(Record.read(out), out)
    print(f"written: {out}, {out.with_suffix('.md')}")
    if rest := [name for name in FAMILIES if name not in {parse(r.text.format(r=8, k=32)).name for r in ROWS}]:
        print(f"families without a row: {', '.join(rest)}")
    if failing := [f"{r['label']} on {r['matrix']}: {r['ratio']:.6f}" for r in rows if not r.get("ok", True)]:
        sys.exit("error ratios above 1 + 1e-5:\n" + "\n".join(failing))


def merged(rows: list[dict], new: dict) -> list[dict]:
    """`rows` with `new` in the place of what it measures anew, else at the end."""
    key = lambda r: tuple(str(r.get(k)) for k in ("label", "matrix", "shape", "n", "spectrum", "rank", "iterations"))
    old = {key(r): r for r in rows}
    return list((old | {key(new): new}).values())


if __name__ == "__main__":
    flags.run(main)
