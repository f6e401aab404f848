"""Errors and costs of tensor products by CP factors, and what is said of them."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import app
from rich import box

from experiments.tensor_product import measure_cost, measure_fit, parsed, report, rotations, table, verdicts
from structmat.training.record import Record

ROOT = Path(__file__).parents[2]


def fit(lmax, rank, error, equivariance):
    return {
        "lmax": lmax,
        "rank": rank,
        "error": error,
        "equivariance": equivariance,
        "equivariance_worst": equivariance,
    }


def cost(lmax, rank, flops, time, nonzero=1.0):
    return {"lmax": lmax, "rank": rank, "flops": 100 * flops, "plain_flops": 100, "nonzero_flops": 100 * nonzero,
            "paths": 5, "ms": time, "plain_ms": 1.0, "flops_ratio": flops, "time_ratio": time}  # fmt: skip


def test_rows_are_read():
    assert parsed(["2:28", "1:7", "2:28"]) == [(1, 7), (2, 28)]
    for text, message in (("2", "'2' is not degree:rank"), ("0:1", "degree 0 must be"), ("7:1", "degree 7 must be"),
                          ("1:17", "rank is 17")):  # fmt: skip
        with pytest.raises(app.UsageError, match=message):
            parsed([text])
    with pytest.raises(app.UsageError, match="is empty"):
        parsed([])


def test_rotations_are_rotations():
    found = rotations(jax.random.key(0), 50)
    assert found.shape == (50, 3, 3) and found.dtype == np.float64
    np.testing.assert_allclose(found @ found.swapaxes(1, 2), np.broadcast_to(np.eye(3), found.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-12)
    assert np.abs(found.mean(axis=0)).max() < 0.35


def test_costs_beside_the_plain_contraction():
    rows = measure_cost(2, [5, 28], 32, 2, separate=True)
    assert [r["rank"] for r in rows] == [5, 28, None] and {r["paths"] for r in rows} == {15}
    assert [r["flops"] for r in rows[:2]] == [2 * 27 * 5 + 10, 2 * 27 * 28 + 56] and rows[0]["plain_flops"] == 1548
    assert {r["nonzero_flops"] for r in rows} == {3 * 137} and all(r["ms"] > 0 and r["time_ratio"] > 0 for r in rows)


def test_errors_of_factors():
    """Degree 1 at the paper's rank, as found by other code of other signs within a path; the equivariance error in its bound."""
    row = measure_fit(1, 7, rotations(jax.random.key(1), 20))
    assert 0.01 < row["error"] < 0.03 and row["equivariance_worst"] <= 2 * row["error"]
    assert row["equivariance"] <= row["equivariance_worst"]


def test_verdicts_say_where_it_does_not_pay():
    fits = [
        fit(1, 5, 0.2, 0.2),
        fit(1, 8, 0.001, 0.001),
        fit(2, 14, 0.3, 0.1),
        fit(2, 28, 0.1, 0.25),
        fit(3, 63, 0.1, 0.005),
    ]
    costs = [cost(1, 5, 0.9, 1.2), cost(1, 8, 1.5, 1.3), cost(2, 28, 1.0, 0.8), cost(3, 63, 0.7, 0.5, nonzero=0.9),
             cost(3, None, 2.0, 4.0)]  # fmt: skip
    said = "\n".join(verdicts(fits, costs))
    assert "L = 1: the equivariance error falls over ranks 5, 8." in said
    assert "L = 1: rank 8, the first below 1%, takes 1.50 times the FLOPs and 1.30 times the time" in said
    assert (
        "of the plain contraction: it does not pay." in said
        and "0.50 times the time of the plain contraction: it pays." in said
    )
    assert "L = 2: the equivariance error does NOT fall" in said and "L = 2: no rank of 14, 28" in said
    assert "is 2.50 times the fit error of the same rank; the bound is 2, which is EXCEEDED." in said
    assert "less FLOPs than the plain contraction at L = 1 rank 5 (0.90), L = 3 rank 63 (0.70), and does not at" in said
    assert "less time than the plain contraction at L = 2 rank 28 (0.80), L = 3 rank 63 (0.50), and does not at" in said
    assert "no more FLOPs than CP at 2 of 4 rows: L = 1 rank 8, L = 2 rank 28." in said
    assert "4.00 at L = 3" in said


def test_the_page(tmp_path):
    fits, costs = [fit(1, 5, 0.2, 0.3)], [cost(1, 5, 0.9, 1.2), cost(1, None, 2.0, 4.0), cost(4, 28, 0.5, 0.5)]
    config = {"rotations": 9, "pairs": 32, "repeats": 2}
    record = Record.create(name="x", kind="bench", config=config, structures={}, seed=0, data_hash="", seconds=1.0,
                           metrics={"fits": fits, "costs": costs})  # fmt: skip
    report(record, tmp_path / "x.json")
    page = (tmp_path / "x.md").read_text()
    assert "9 random rotations" in page and "- L = 1: no rank of 5 brings" in page and "| per path |" in page
    assert table(fits, costs, box.MARKDOWN).row_count == 3


@pytest.mark.long
def test_the_command(tmp_path):
    out = tmp_path / "t.json"
    line = [sys.executable, "-m", "experiments.tensor_product", "--rows=1:7,1:8,2:14", "--fit=1", "--separate=1",
            "--pairs=64", "--repeats=2", "--rotations=5", f"--out={out}"]  # fmt: skip
    subprocess.run(line, check=True, cwd=ROOT, capture_output=True)
    record = Record.read(out)
    assert [f["rank"] for f in record.metrics["fits"]] == [7, 8]
    assert [c["rank"] for c in record.metrics["costs"]] == [7, 8, None, 14]
    assert out.with_suffix(".md").read_text().startswith("# Tensor products by CP factors")
    wrong = subprocess.run([*line, "--rows=9:1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "degree 9 must be in 0..6" in wrong.stdout + wrong.stderr
