"""Processes killed at random moments; the run that is left at the end has the bits of an undisturbed one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.test_loop import array_sums

ROOT = Path(__file__).parents[2]
KILLS = 6


def start(folder):
    flags = ["--config=configs/digits.py:low_rank(rank=4) + random_sparse(density=0.05)", f"--workdir={folder}"]
    flags += ["--config.steps=3000", "--config.checkpoint.every=200", "--config.model.dropout=0.1"]
    command = [sys.executable, "-m", "experiments.train", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def saved(folder):
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(2))
def test_killed_runs_end_with_the_same_bits(seed, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait() == 0
    draw, killed = random.Random(seed), 0
    rows, saves = parts / "metrics.jsonl", parts / "checkpoints"
    for _ in range(KILLS):
        process, before, until = start(parts), written(rows), time.monotonic() + 60
        moved = lambda before=before: written(rows) != before and saved(saves)
        while process.poll() is None and not moved() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(draw.random() * 3)
        process.kill()
        killed += process.wait() != 0
    assert killed >= 3 and saved(saves)
    assert start(parts).wait() == 0
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
