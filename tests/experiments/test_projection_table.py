import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich import box

from experiments import projection
from experiments.projection_references import ROWS, ksvd, nearest, paired, unit, unpaired
from experiments.projection_report import details, mark, summary, svd_table
from structmat.structures import FAMILIES, parse
from structmat.training.record import Record

ROOT = Path(__file__).parents[2]
QUICK = ["monarch(blocks=4)", "kronecker(terms=4)", "tensor_train(rank=4, cores=3)", "toeplitz()", "n_m_sparse(2, 4)"]


@pytest.fixture(scope="module")
def rows():
    chosen = [r for r in ROWS if r.text in [*QUICK, "block_tensor_train(rank=2, cores=3)"]]
    return [found for row in chosen for found in projection.measure(row, (16, 24), ["normal", "AR(1)"], 1)]


def test_every_row_is_as_near_as_its_reference(rows):
    assert len(rows) == 12 and not jax.config.jax_enable_x64
    for r in rows:
        assert r["ms"] > 0 and r["compile_ms"] >= 0 and abs(r["error"] - r["error_f32"]) < 1e-5
        if r["reference"] != "-":
            assert r["ok"] and r["ratio"] <= 1 + 1e-5 and r["error"] <= r["reference_error"] * (1 + 1e-5) + 1e-12
    assert summary(rows, box.MARKDOWN).row_count == 6 and details(rows, box.MARKDOWN).row_count == 12


def test_a_worse_projection_fails(rows):
    """Whatever is 2e-5 above the reference is marked; not a number too; and rounding is not."""
    row, w = next(r for r in ROWS if r.text == "monarch(blocks=4)"), np.random.default_rng(0).normal(size=(16, 24))
    bound = parse(row.text).bind(16, 24)
    best = projection.relative(w, row.reference(w, bound))
    judged = lambda error: projection.compare(row, w, bound, error, error, 1.0, 1)["ok"]
    assert judged(best) and judged(best * (1 + 5e-6)) and not judged(best * (1 + 2e-5)) and not judged(float("nan"))
    assert "FAILS" in mark(1 + 2e-5) and "FAILS" in mark(float("nan")) and "FAILS" not in mark(1.0)
    member = row.reference(w, bound)
    assert projection.compare(row, member, bound, 5e-13, 0.0, 1.0, 1)["ok"]


def test_the_command_exits_with_an_error_when_a_row_fails(monkeypatch, tmp_path):
    worse = lambda w, bound: w - 0.999 * (w - ROWS[0].reference(w, bound))
    bad = projection.Row(ROWS[0].text, "unbeatable", worse)
    monkeypatch.setattr(projection, "ROWS", [bad])
    projection.flags.FLAGS.mark_as_parsed()
    for name, value in (("quick", True), ("out", str(tmp_path / "q.json")), ("repeats", 1)):
        monkeypatch.setattr(projection.flags.FLAGS, name, value)
    with pytest.raises(SystemExit, match=r"above 1 \+ 1e-5:\nlow_rank\(rank=2\) on normal: 1\.001"):
        projection.main(["projection"])
    record = Record.read(tmp_path / "q.json")
    assert [r["ok"] for r in record.metrics["rows"]] == [False, False]
    assert "1.001001 FAILS" in (tmp_path / "q.md").read_text()


@pytest.mark.long
def test_the_command(tmp_path):
    """From a shell, in pieces: rows that are not measured again stay."""
    out = tmp_path / "q.json"
    for only in ("diagonal()", "identity()"):
        line = [sys.executable, "-m", "experiments.projection", "--quick", f"--only={only}", f"--out={out}"]
        subprocess.run(line, check=True, cwd=ROOT, capture_output=True)
    assert [r["label"] for r in json.loads(out.read_text())["metrics"]["rows"]] == ["diagonal()"] * 2 + [
        "identity()"
    ] * 2
    page = out.with_suffix(".md").read_text()
    assert page.startswith("# Projections beside other libraries") and "| identity()" in page
    wrong = subprocess.run([*line[:-2], "--only=nothing"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "is in none of" in wrong.stdout + wrong.stderr


def test_rows_bind_at_all_sizes():
    assert len({r.text for r in ROWS}) == len(ROWS) > 30
    for r in ROWS:
        for n, m in projection.SIZES.values():
            parse(r.text.format(r=max(2, n // 16), k=n // 4)).bind(n, n if r.square else m)


@pytest.mark.long
def test_randomized_beside_exact():
    rows = list(itertools.islice(projection.measure_svd(256), 3))
    assert [(r["rank"], r["iterations"]) for r in rows] == [(2, 2), (2, 4), (2, 6)]
    assert 0.05 > rows[0]["excess"] > rows[1]["excess"] > rows[2]["excess"] > 0
    assert all(r["speedup"] == r["exact_ms"] / r["ms"] for r in rows) and svd_table(rows, box.MARKDOWN).row_count == 3


def test_references_are_what_they_say():
    rng = np.random.default_rng(1)
    w, modes = rng.normal(size=(12, 10)), ((3, 2), (4, 5))
    np.testing.assert_array_equal(unpaired(paired(w, modes), modes, w.shape), w)
    np.testing.assert_allclose(
        paired(np.kron(a := rng.normal(size=(3, 2)), b := rng.normal(size=(4, 5))), modes), np.outer(a, b)
    )
    planted = unit(rng.normal(size=(12, 5)))
    code = rng.normal(size=(5, 40)) * (rng.random((5, 40)) < 0.2)
    found = ksvd(planted @ code, unit(rng.normal(size=(12, 5))), 2)
    errors = [np.linalg.norm(planted @ code - m) for m in found]
    assert errors[-1] < errors[0] and nearest(planted @ code, found) is found[int(np.argmin(errors))]


def test_the_published_record_holds():
    record = Record.read(ROOT / "results/projection/cpu.json")
    rows = record.metrics["rows"]
    assert record.device["platform"] == "cpu" and {tuple(r["shape"]) for r in rows} == {(128, 192), (128, 128)}
    assert len({parse(r["label"]).name for r in rows} & set(FAMILIES)) >= 29 and len({r["matrix"] for r in rows}) == 5
    assert all(r.get("ok", True) for r in rows) and all(r["ratio"] <= 1 + 1e-5 for r in rows if "ratio" in r)
