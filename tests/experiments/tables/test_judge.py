"""Claims are judged by the interval of paired differences."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.tables.judge import interval, judge


def test_interval_is_student_t():
    values = np.random.default_rng(0).normal(size=7)
    want = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(interval(list(values)), want, rtol=1e-12)
    assert interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("better", "worse", "lower", "status"),
    [
        ([1.0, 1.1, 1.2], [1.5, 1.61, 1.69], True, "holds"),
        ([1.0, 1.1, 1.2], [1.5, 1.61, 1.69], False, "does not hold"),
        ([1.5, 1.61, 1.69], [1.0, 1.1, 1.2], True, "does not hold"),
        ([1.0, 1.6, 1.2], [1.5, 1.0, 1.3], True, "not decided"),
        ([1.0], [9.0], True, "not decided"),
    ],
)
def test_orderings(better, worse, lower, status):
    found = judge(better, worse, lower)
    assert found.status == status and found.seeds == len(better)


def test_pairs_count_and_not_levels():
    """Seeds that differ by far more than the arms do: the paired difference decides all the same."""
    better = [1.0, 5.0, 9.0]
    assert judge(better, [b + 0.1 + 0.001 * i for i, b in enumerate(better)], True).status == "holds"


def test_close_enough():
    worse = [1.0, 1.1, 1.2]
    behind = [w + 0.03 + 0.001 * i for i, w in enumerate(worse)]
    assert judge(behind, worse, True).status == "does not hold"
    assert judge(behind, worse, True, within=0.05).status == "holds"
    assert judge(behind, worse, True, within=0.01).status == "does not hold"
    assert judge(behind, worse, True, within=0.031).status == "not decided"


def test_no_pairs():
    with pytest.raises(ValueError, match="pairs"):
        judge([], [], True)
    with pytest.raises(ValueError, match="2 and 1"):
        judge([1.0, 2.0], [1.0], True)
