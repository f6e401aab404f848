"""The table of compiler's estimates: resumed, judged, and honest about what it could not estimate."""

import json

import pytest
from absl import app
from rich import box

from experiments import tpu_static
from experiments.static_cycles import Estimate, analysed, estimate, failure
from experiments.tpu_static_table import failures, judged, name_of, report, table, verdict
from structmat.training.record import Record

ONE = "kronecker major=8,terms=1, n 4096, v6e, forward"


@pytest.fixture
def calls(monkeypatch):
    """Estimates asked for, as (operation, tokens, implementation); XLA's profile of many tokens fails."""
    asked = []

    def fake(product, chip, implementation, direction, limit):
        asked.append((product.op, product.tokens, implementation))
        if implementation == "xla" and product.tokens > tpu_static.FEWER:
            return Estimate(None, "too long")
        return Estimate({"dense": 90_000, "xla": 20_000, "pallas": 30_000}[implementation])

    monkeypatch.setattr(tpu_static, "estimate", fake)
    monkeypatch.setattr(tpu_static, "analysed", lambda product, chip, name, *_: {"dense": 180.0, "xla": 90.0}[name])
    return asked


def test_rows_are_kept_and_failures_scaled_from_fewer_tokens(calls, tmp_path):
    out = tmp_path / "t.json"
    (row,) = tpu_static.run(out, 1.0, ONE, False, 9.0)
    assert calls == [
        ("kronecker", n, i) for n, i in ((1024, "dense"), (1024, "xla"), (tpu_static.FEWER, "xla"), (1024, "pallas"))
    ]
    assert row["cycles"] == {"dense": 90_000, "xla": 40_000, "pallas": 30_000} and row["scaled"] == ["xla"]
    assert row["why"] == {"xla": "too long"} and row["rule"] == "pallas" and row["commit"]
    calls.clear()
    assert tpu_static.run(out, 1.0, ONE, False, 9.0) == [row] and not calls
    assert tpu_static.run(out, 0.0, "kronecker", False, 9.0) == [row] and not calls
    two = tpu_static.run(out, 1.0, "kronecker major=32,terms=1, n 4096, v6e, forward", False, 9.0)
    assert len(two) == 2 and two[1]["cycles"]["dense"] == 90_000 and "dense" not in [i for _, _, i in calls]
    calls.clear()
    again = tpu_static.run(out, 1.0, ONE, True, 9.0)
    assert len(again) == 2 and [i for _, _, i in calls] == ["xla", "xla", "pallas"]
    record = Record.read(out)
    assert record.config["label"] == "compiler's estimate, not a measurement"
    report(record.metrics["rows"], out, "about")
    page = out.with_suffix(".md").read_text()
    assert "not a measurement" in page and "slower than XLA in 0 of 2 rows" in page and "~40.0" in page


def test_a_refused_kernel_is_not_compiled(calls, tmp_path):
    (row,) = tpu_static.run(tmp_path / "t.json", 1.0, "low_rank rank=128, n 4096, v5e, forward", False, 9.0)
    assert {i for _, _, i in calls} == {"dense", "xla"} and row["cycles"]["pallas"] is None
    assert row["rule"] == "xla" and row["why"]["pallas"] == row["unsupported"] != "" and row["over_xla"] == 1
    assert failures([row]) == []


@pytest.mark.parametrize(
    ("cycles", "over_xla", "slower"),
    [
        ({"dense": 90, "xla": 50, "pallas": 25}, 2.0, False),
        ({"dense": 90, "xla": 50, "pallas": 60}, 50 / 60, True),
        ({"dense": 90, "xla": 5, "pallas": 10}, 1.0, False),  # both under the floor
        ({"dense": 90, "xla": None, "pallas": 10}, None, False),
    ],
)
def test_the_verdict_compares_no_less_than_the_floor(cycles, over_xla, slower):
    base = {"case": "a", "n": 8, "chip": "v5e", "direction": "both", "rule": "pallas", "floor": 20, "dense_floor": 40}
    row = judged(base | {"cycles": cycles})
    assert row["over_xla"] == over_xla and row["slower"] == slower
    said = verdict([row])
    assert (f"in {int(slower)} of 1 rows" in said) and (name_of(row) in said) == (slower or over_xla is None)


def test_a_faster_kernel_that_is_not_chosen_is_named():
    base = {"case": "a", "n": 8, "chip": "v5e", "direction": "both", "rule": "xla", "floor": 20, "dense_floor": 40}
    row = judged(base | {"cycles": {"dense": 90, "xla": 50, "pallas": 40}})
    assert row["over_xla"] == 1 and row["missed"] and "faster in 1 rows; a, n 8, v5e, both." in verdict([row])
    assert not judged(base | {"cycles": {"dense": 90, "xla": 50, "pallas": 60}})["missed"]


def test_every_planned_row_has_a_rule_and_a_place_in_the_table():
    cycles = {
        "cycles": {"dense": 9, "xla": 9, "pallas": None},
        "why": {"pallas": "p"},
        "scaled": [],
        "notes": {},
        "analysed": [],
    }
    rows = [tpu_static.with_rule(r | cycles) for r in tpu_static.plan()]
    assert len({name_of(r) for r in rows}) == len(rows) > 60
    assert table(rows, box.MARKDOWN).row_count == len(rows)
    assert all(("pallas" if not r["unsupported"] else "xla") == r["rule"] or r["rule"] == "xla" for r in rows)
    assert all(r["flop_reduction"] > 1 and r["floor"] > 0 for r in rows)
    (line,) = failures([r for r in rows if r["rule"] == "pallas"])
    assert line.startswith("- pallas: p (")


def test_notes_of_an_estimate_are_kept_and_marked(monkeypatch, tmp_path):
    found = Estimate(1000, parts={"fusion": 1000}, idealised=("fusion",), alone=True)
    monkeypatch.setattr(tpu_static, "estimate", lambda *_: found)
    (row,) = tpu_static.run(tmp_path / "t.json", 1.0, ONE, False, 9.0)
    assert row["notes"]["xla"] == {"idealised": ("fusion",), "alone": True} and row["scaled"] == []
    report([row], tmp_path / "t.json", "about")
    assert "+1.0" in (tmp_path / "t.md").read_text()


def test_a_row_that_does_not_exist(tmp_path):
    with pytest.raises(app.UsageError, match="is in no row"):
        tpu_static.run(tmp_path / "t.json", 1.0, "monark", False, 9.0)


def test_cost_analysis_stands_in_beside_dense_where_the_profiler_fails(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(tpu_static, "estimate", lambda *a: Estimate(None, "no") if a[2] == "xla" else Estimate(80_000))
    (row,) = tpu_static.run(tmp_path / "t.json", 1.0, ONE, False, 9.0)
    assert row["cycles"]["xla"] == 40_000 and row["analysed"] == ["xla"] and row["why"] == {"xla": "no"}
    report([row], tmp_path / "t.json", "about")
    assert "?40.0" in (tmp_path / "t.md").read_text() and failures([row]) == []


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("a\nF1121 12:19:00 28208 low_level_alloc.cc:625] RAW: mmap error: 12\nFatal Python error: Aborted", "14 GiB"),
        ("Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):", "the profiler aborts"),
        ("Traceback\nValueError: first\nValueError: blocks\n", "ValueError: blocks"),
        ("", "ended with code -9"),
    ],
)
def test_why_there_is_no_estimate_is_said_without_the_log(stderr, said):
    why = failure(stderr, -9)
    assert said in why and "F1121" not in why and "Fatal" not in why


@pytest.mark.tpu_aot
def test_the_compiler_estimates_a_planned_product():
    product = tpu_static.Product("low_rank", 256, 1024, {"rank": 128})
    dense, xla = (estimate(product, "v5e", name, "forward", 100) for name in ("dense", "xla"))
    assert 0 < xla.cycles < dense.cycles and json.dumps(xla.parts)
    by_cost = [analysed(product, "v5e", name, "forward", 100) for name in ("dense", "xla")]
    assert 0 < by_cost[1] < by_cost[0]
