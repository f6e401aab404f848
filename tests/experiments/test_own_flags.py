"""Commands that run no config answer mistakes as those do that run one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiments.structures", "--wirte"], "error: Unknown command line flag 'wirte'. Did you mean: write ?"),
        (["experiments.tables", "shw"], "error: no command 'shw'; did you mean 'show'?"),
        (["experiments.tables", "list", "--scale=cppu"], "error: flag --scale=cppu: value should be one of"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words, said):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1 and not done.stdout
