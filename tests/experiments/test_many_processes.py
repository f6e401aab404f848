"""The train command as 2 and 4 processes: as one, killed, stopped, resumed by others, misled; short R2, R3 and R10."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.launch import local
from structmat.training.metrics import read_metrics
from tests.training.test_loop import array_sums

ROOT = Path(__file__).parents[2]
CONFIG = "--config=configs/digits.py:low_rank(rank=4) + random_sparse(density=0.1)"
FIELDS = {
    "steps": 120,  # some seconds more than the one in which jax tells all processes of a SIGTERM
    "log_every": 1,
    "checkpoint.every": 12,
    "model.width": 64,
    "model.dropout": 0.1,
    "eval.batches": 2,
}

pytestmark = pytest.mark.multiprocess


def command(folder, **fields):
    """The train command."""
    flags = [f"--config.{name}={value}" for name, value in (FIELDS | fields).items()]
    return [sys.executable, "-m", "experiments.train", CONFIG, f"--workdir={folder}", *flags]


def rows(folder):
    try:
        return len(read_metrics(folder))
    except (OSError, ValueError):
        return 0


def run(capfd, folder, count, devices, act=None, when=0, **fields):
    """(exit code, stderr, seconds since `act`) of a job; `act(job)` is called once `when` rows are written."""
    job, acted = local.Job(command(folder, **fields), count, devices, grace=30), []

    def watch():
        while rows(folder) < when:
            time.sleep(0.01)
        acted.append(time.monotonic())
        act(job)

    if act is not None:
        threading.Thread(target=watch, daemon=True).start()
    capfd.readouterr()
    code = job.run()
    return code, capfd.readouterr().err, time.monotonic() - (acted or [0.0])[0]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The root of the repository, optimised programs, compiled once per layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("XLA_FLAGS", raising=False)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """A run of two processes with two devices each that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert local.Job(command(folder), 2, 2, grace=30).run() == 0
    return folder


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


def assert_close(folder, whole, start=1):
    found, wanted = losses(folder), losses(whole)
    assert list(found) == list(wanted) == list(range(1, FIELDS["steps"] + 1))
    steps = range(start, FIELDS["steps"] + 1)
    np.testing.assert_allclose([found[s] for s in steps], [wanted[s] for s in steps], rtol=1e-6)


def test_two_processes_with_two_devices_are_one_with_four(whole, capfd, tmp_path):
    code, said, _ = run(capfd, tmp_path / "run", 1, 4)
    assert code == 0, said
    assert_close(tmp_path / "run", whole)


def test_a_switch_in_two_processes_is_that_of_one(capfd, tmp_path):
    switch = "6: dense(); 12: layers_0 -> random_sparse(density=0.1)"
    fields, reports = {"mesh.data": 2, "mesh.fsdp": 2, "steps": 18, "checkpoint.every": 100}, []
    for count, devices in ((2, 2), (1, 4)):
        folder = tmp_path / str(count)
        code, said, _ = run(capfd, folder, count, devices, switch=switch, **fields)
        assert code == 0, said
        switches = json.loads((folder / "record.json").read_text())["metrics"]["switches"]
        reports.append([(row["step"], row["params_after"], round(row["worst_error"], 3)) for row in switches])
    assert reports[0] == reports[1] and [step for step, _, _ in reports[0]] == [6, 12]
    found, wanted = losses(tmp_path / "2"), losses(tmp_path / "1")
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-4)


@pytest.mark.parametrize("victim", [1])
def test_a_killed_process_ends_the_other_which_says_so_and_the_next_start_has_the_same_bits(
    victim, whole, capfd, tmp_path
):
    folder = tmp_path / "run"
    code, said, seconds = run(capfd, folder, 2, 2, act=lambda job: job.children[victim].kill(), when=20)
    assert code == 128 + 9 and seconds < 30
    assert f"process {victim} of 2 was killed by SIGKILL" in said
    sentence = next(line for line in said.splitlines() if line.startswith(f"[{1 - victim}] stopped: "))
    assert f"process {victim} of 2 (host " in sentence and "is gone" in sentence
    assert f"process {1 - victim} of 2 ended with exit code 75" in said and "Check failure stack" not in said
    assert not (folder / "record.json").exists()
    code, said, _ = run(capfd, folder, 2, 2)
    assert code == 0 and "resumed from step" in said
    assert array_sums(folder) == array_sums(whole)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_sigterm_saves_and_other_numbers_of_processes_go_on(whole, capfd, tmp_path):
    folder, more, fewer = (tmp_path / name for name in ("run", "more", "fewer"))
    one = lambda job: job.children[1].terminate()
    code, said, _ = run(capfd, folder, 2, 2, act=one, when=14, **{"checkpoint.every": 1000})
    assert code == 0, said
    assert "[0]" in said and "stopped by SIGTERM after step" in said
    (step,) = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert list(losses(folder))[-1] == step and 14 <= step < FIELDS["steps"]
    for other, count in ((more, 4), (fewer, 1)):
        shutil.copytree(folder, other)
        code, said, _ = run(capfd, other, count, 1)
        assert code == 0 and f"resumed from step {step}" in said and "skipped" not in said, said
        assert_close(other, whole, start=step + 1)
    assert json.loads((more / "record.json").read_text())["device"]["count"] == 4


def test_a_missing_process_is_named(tmp_path):
    at = ["--start_timeout=1", f"--coordinator=127.0.0.1:{local.free_port()}", "--processes=3", "--process=0"]
    done = subprocess.run([*command(tmp_path / "run"), *at], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: missing after 1 s: process 1, 2 of 3 (here: 0)")
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_in_all_processes_is_said_once(capfd, tmp_path):
    code, said, _ = run(capfd, tmp_path / "run", 2, 2, batch=7)
    assert code == 2 and said.count("config.batch = 7") == 1 and "Check failure" not in said and "gone" not in said
    assert not (tmp_path / "run").exists()
