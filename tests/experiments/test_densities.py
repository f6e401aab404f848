"""Densities of layers at a prompt."""

import subprocess
import sys

import pytest

from structmat.training.config import validate
from tests.test_readme import ROOT
from tests.training.small_runs import small_digits


@pytest.mark.long
def test_what_is_printed_is_a_structure_of_the_config():
    command = [sys.executable, "-m", "experiments.densities", "--config=configs/digits.py", "--config.method=rigl(25)"]
    run = lambda *more: subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    text = run("--density=0.05", "--kind=linear", "--kind=head", "--rescale").stdout
    config = small_digits(structure=text.strip())
    config.model.update(layers=2, width=128)
    bounds = [site.bound for site in validate(config).table.values()]
    kept, whole = (sum(f(b) for b in bounds) for f in (lambda b: b.pattern.count, lambda b: b.d_in * b.d_out))
    assert kept == pytest.approx(0.05 * whole, abs=2) and len(bounds) == 3 and "rescale=True" in text
    wrong = run("--density=2")
    assert wrong.returncode == 2 and "density must be in (0, 1], got 2.0" in wrong.stderr
    assert run().returncode == 2
