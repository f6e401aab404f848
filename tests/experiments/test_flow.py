"""Operators beyond what they were trained for: against the held-out figures of training, and against the solver."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flow
from structmat.analysis.fields import relative_l2
from structmat.training import loop
from structmat.training.config import default
from structmat.training.errors import RunError
from structmat.training.record import Record

ROOT = Path(__file__).parents[2]


def small(folder, model="fno"):
    config = default("navier_stokes", model)
    config.update(steps=3, batch=8)
    config.data.update(
        resolution=8, solve_resolution=16, fine=0 if model != "fno" else 16, time=0.5, dt=0.1, train=8, test=3,
        folder=str(folder),
    )  # fmt: skip
    config.model.update(width=4, layers=1, modes=4)
    config.mup.base_width = 4
    return config


@pytest.mark.long
def test_figures_are_those_of_training_and_of_the_solver(tmp_path):
    records = {}
    for name, model in (("fno", "fno"), ("monarch", "monarch_operator")):
        records[name] = loop.train(small(tmp_path / "pde", model), tmp_path / name, name=name)
    runs = flow.runs_of([str(tmp_path / name) for name in records])
    for name, run in runs.items():
        row, arrays = flow.measure(name, run, 3)
        held = records[name].metrics["heldout"]
        assert row["l2"] == pytest.approx(held["l2"], rel=1e-4) and row["h1"] == pytest.approx(held["h1"], rel=1e-4)
        assert row["l2_fine"] == (pytest.approx(held["l2_fine"], rel=1e-4) if name == "fno" else None)
        assert row["later"][0] == pytest.approx(row["l2"], rel=1e-5) and arrays["truth"].shape == (3, 3, 8, 8)
        solved = flow.solutions(run.config.data).at(8)
        np.testing.assert_allclose(arrays["truth"][:, 0], solved.outputs[:3, 0], atol=1e-5)
        apply = flow.operator(run, flow.scales(solved, 3))
        thrice = apply(apply(apply(solved.inputs[:3])))
        error = relative_l2(jnp.asarray(thrice, jnp.float32), jnp.asarray(arrays["truth"][:, 2]))
        assert row["later"][2] == pytest.approx(float(error.mean()), rel=1e-4)
    args = [f"--runs={tmp_path / 'fno'},{tmp_path / 'monarch'}", "--later=2", "--shown=1", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-m", "experiments.flow", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "growth" in done.stdout, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "flow.json", "table.md", "spectra.png", "growth.png", "fields_fno.png", "fields_monarch.png",
    }  # fmt: skip
    page = (tmp_path / "out" / "table.md").read_text()
    assert len(Record.read(tmp_path / "out" / "flow.json").metrics["rows"]) == 2 and page.count(".png") == 4


def test_no_runs_are_refused():
    with pytest.raises(RunError, match="--runs is empty"):
        flow.runs_of([])
