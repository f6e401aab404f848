"""Does a claim hold: by the 95% interval of the paired differences over seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from scipy import stats

Status = Literal["holds", "does not hold", "not decided"]
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Attributes:
    status: of the claim. gain: mean of (worse - better) where lower is better, else of (better - worse).
    low, high: the interval of the mean gain; infinite with fewer than two seeds. seeds: pairs behind it.
    """

    status: Status
    gain: float
    low: float
    high: float
    seeds: int


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval of the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def judge(
    better: Sequence[float], worse: Sequence[float], lower_is_better: bool, within: float | None = None
) -> Verdict:
    """Judge a claim from the metric of both arms on the same seeds, in the same order.

    An ordering holds where the whole interval of the gain is above zero, and does not where it is below. With `within` the
    claim is gain >= -within, and holds where the whole interval is above that.

    Raises:
      ValueError: another number of seeds for one arm than for the other, or none.
    """
    if len(better) != len(worse) or not better:
        raise ValueError(f"the claim needs pairs of runs, got {len(better)} and {len(worse)}")
    sign = 1 if lower_is_better else -1
    gains = [sign * (w - b) for b, w in zip(better, worse)]
    low, high = interval(gains)
    bar = -within if within is not None else 0.0
    status: Status = "holds" if low > bar else "does not hold" if high < bar else "not decided"
    return Verdict(status, statistics.fmean(gains), low, high, len(gains))
