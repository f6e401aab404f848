"""Rows made one after another: which, and until when."""

from types import SimpleNamespace

import pytest
from absl import app

from experiments import rows


def test_rows_are_selected_by_a_part_of_their_name():
    assert rows.selected([10, 21, 30], str, "1") == [10, 21] and rows.selected([10, 21], str, "") == [10, 21]
    with pytest.raises(app.UsageError, match="--only='4' is in no row; the first is '10'"):
        rows.selected([10, 21], str, "4")


def test_the_time_is_looked_at_before_every_row(monkeypatch, capsys):
    clock = iter([100.0, 100.0, 159.0, 160.0])
    monkeypatch.setattr(rows, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(rows.within("abcd", 1.0)) == ["a", "b"]
    assert capsys.readouterr().out == "stopped after 1 minutes with 2 rows to go; run again to go on\n"


def test_no_time_is_no_row_and_enough_says_nothing(capsys):
    assert list(rows.within("abc", 9.0)) == ["a", "b", "c"] and not capsys.readouterr().out
    assert list(rows.within("abc", 0.0)) == [] and "with 3 rows to go" in capsys.readouterr().out
    assert list(rows.within("", 0.0)) == [] and not capsys.readouterr().out
