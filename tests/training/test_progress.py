"""Progress: rates without the compiling step, honest ETA, the outer loop, both outputs; on a clock of our own."""

import io

import pytest

from structmat.training.progress import Meter, ProgressLine, Runs


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_compile_time_is_in_neither_step_time_nor_eta(clock):
    meter = Meter(101, clock=clock)
    assert meter.rates().eta_seconds is None and meter.rates().compile_seconds is None
    clock.now += 60
    meter.tick(1)
    first = meter.rates()
    assert first.compile_seconds == 60 and first.eta_seconds is None and first.step_seconds is None
    for step in range(2, 12):
        clock.now += 0.5
        meter.tick(step)
    rates = meter.rates()
    assert rates.step_seconds == pytest.approx(0.5) and rates.eta_seconds == pytest.approx(90 * 0.5)


def test_time_beside_the_steps_is_in_the_eta_only(clock):
    meter = Meter(21, clock=clock)
    with meter.beside():
        clock.now += 5  # an evaluation before the first step
    clock.now += 3
    meter.tick(1)
    for step in range(2, 12):
        clock.now += 1
        meter.tick(step)
    with meter.beside():
        clock.now += 10
    rates = meter.rates()
    assert rates.step_seconds == pytest.approx(1) and rates.eta_seconds == pytest.approx(10 * 2)
    assert meter.elapsed == pytest.approx(28)


def test_resumed_and_finished(clock):
    meter = Meter(100, start=90, clock=clock)
    clock.now += 7
    meter.tick(91)
    for step in range(92, 101):
        clock.now += 2
        meter.tick(step)
    assert meter.rates().step_seconds == pytest.approx(2) and meter.rates().eta_seconds == 0


def test_total_eta_over_runs():
    runs = Runs(4)
    runs.begin()
    assert runs.eta(10, None) is None
    assert runs.eta(10, 30) == pytest.approx(30 + 3 * 40)
    runs.finish(50)
    runs.skip()
    runs.begin()
    assert runs.eta(5, None) == pytest.approx(45 + 50)  # as long as the finished one
    assert runs.eta(10, 20) == pytest.approx(20 + (50 + 30) / 2)
    runs.finish(30)
    runs.begin()
    assert runs.eta(10, 20) == pytest.approx(20)


def line(clock, stream, **changes):
    options = {"per_step": 1000, "unit": "tokens", "step_flops": 2e9, "stream": stream, "clock": clock}
    return ProgressLine("low_rank(rank=8)", 5, **(options | changes))


def drive(progress, clock):
    with progress:
        for step in range(1, 6):
            clock.now += 30 if step == 1 else 0.02
            progress.tick(step, {"loss": 4.0 - step})


def test_log_lines(clock):
    stream = io.StringIO()
    runs = Runs(3)
    runs.begin()
    drive(line(clock, stream, interval=0.03, runs=runs), clock)
    first, *middle, last = stream.getvalue().splitlines()
    assert first == "[1/3] low_rank(rank=8)  step 1/5  loss 3  ETA ?  all ?"
    assert len(middle) == 2
    assert middle[0].startswith(
        "[1/3] low_rank(rank=8)  step 3/5  20 ms/step  50k tokens/s  100 GFLOP/s  loss 1  ETA 0:00"
    )
    assert last.startswith("[1/3] low_rank(rank=8)  step 5/5  20 ms/step") and "ETA" not in last
    assert last.endswith("all 1:00")


def test_utilisation_only_with_a_known_peak(clock):
    for peak, expected in ((None, False), (2e11, True)):
        stream = io.StringIO()
        drive(line(clock, stream, peak_flops=peak), clock)
        assert ("50% of peak" in stream.getvalue()) is expected


def test_terminal_gets_one_live_line_and_a_last_plain_one(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    drive(line(clock, stream), clock)
    text = stream.getvalue()
    assert "\x1b[" in text  # cursor control
    assert text.splitlines()[-1].endswith("low_rank(rank=8)  step 5/5  20 ms/step  50k tokens/s  100 GFLOP/s  loss -1")


def test_only_process_0_shows(clock, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    stream = io.StringIO()
    drive(line(clock, stream), clock)
    assert stream.getvalue() == ""
