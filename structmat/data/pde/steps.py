"""Time steps between snapshots."""

from __future__ import annotations

from structmat.data.errors import DataError


def steps_between(time: float, dt: float, snapshots: int) -> int:
    """How many steps of dt lie between two of the snapshots, which are evenly spaced and end at `time`.

    Raises:
      DataError: dt or the number of snapshots does not divide the time; names the nearest dt that does.
    """
    if time <= 0 or dt <= 0 or snapshots < 1:
        raise DataError(f"time {time}, dt {dt} and {snapshots} snapshots; all must be above 0")
    steps = max(1, round(time / dt / snapshots))
    if abs(steps * snapshots * dt - time) > 1e-6 * time:
        raise DataError(
            f"dt {dt} does not divide the time {time} into {snapshots} equal parts; {time / snapshots / steps:.6g} does"
        )
    return steps
