from pathlib import Path

import jax.numpy as jnp
import pytest
from rich import box

from experiments.bench import CASES, break_even, break_even_table, measure, timing_table
from structmat.structures import parse
from structmat.training.record import Record


@pytest.fixture(scope="module")
def rows():
    return [{"case": "low_rank(rank={n8})"} | r for r in measure("low_rank(rank=4)", 32, 4, 3, jnp.float32)]


def test_a_row_holds_both_directions_and_consistent_figures(rows):
    assert [r["direction"] for r in rows] == ["forward", "forward+backward"]
    for r in rows:
        assert r["flop_reduction"] == 4 and r["params"] == 256 and r["transposes"] == 0
        assert r["efficiency"] == pytest.approx(r["speedup"] / 4) and r["ms"] > 0
    assert timing_table(rows, box.MARKDOWN).row_count == 2


def test_break_even_is_the_size_from_which_it_is_never_slower():
    speedups = {256: 1.1, 512: 0.9, 1024: 1.2, 2048: 1.5}
    row = lambda n, s: {"case": "a", "batch": 64, "direction": "forward", "n": n, "speedup": s}
    found = break_even([row(n, s) for n, s in speedups.items()])
    assert found == [{"case": "a", "batch": 64, "direction": "forward", "break_even_n": 1024}]
    assert break_even([row(256, 0.5)])[0]["break_even_n"] is None
    assert break_even_table(found, box.MARKDOWN).row_count == 1


def test_cases_bind_at_the_published_sizes():
    for case in CASES:
        for n in (1024, 2048, 4096):
            parse(case.format(n8=n // 8)).bind(n, n)


def test_the_published_record_is_readable():
    record = Record.read(Path(__file__).parents[2] / "results/bench/cpu.json")
    assert {r["n"] for r in record.metrics["rows"]} >= {1024, 2048, 4096} and record.device["platform"] == "cpu"
