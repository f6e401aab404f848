"""The train command as a user meets it: the dry run, and one-line answers to mistakes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from structmat.training import dry_run
from tests.training.small_runs import small_digits, small_lm

ROOT = Path(__file__).parents[2]
LM, DIGITS = "--config=configs/demo_lm.py", "--config=configs/digits.py"

MISTAKES = [
    ([f"{LM}", "--config.optim.lrr=1"], "--config.optim.lrr: no field 'lrr'; did you mean 'lr'?"),
    ([f"{LM}", "--config.modle.width=3"], "did you mean 'model'?"),
    ([f"{LM}", "--config.steps=2.5"], "2.5"),
    ([f"{LM}", "--config.mup.enabled=no"], "no"),
    ([f"{LM}", "--wrkdir=x"], "Did you mean: workdir"),
    ([f"{LM}", "stray"], "'stray'"),
    ([f"{LM}"], "--workdir is needed"),
    (["--workdir=x"], "--config is needed"),
    (["--config=configs/nope.py"], "there is no file 'configs/nope.py'"),
    (["--config=configs/llama.py", "--workdir=x"], "configs/llama.py needs an argument, such as configs/llama.py:60m"),
    (["--config=configs/gpt2.py:smal", "--workdir=x"], "no 'smal' there; did you mean 'small'?"),
    ([f"{LM}:monrach", "--workdir=x"], "did you mean 'monarch'?"),
    ([f"{LM}", "--config.optim.name=adam", "--workdir=x"], "config.optim.name = 'adam'"),
    ([f"{DIGITS}", "--config.batch=-1", "--dry_run"], "config.batch = -1"),
    ([f"{LM}", "--config.data.root=/no/such/folder.npy", "--workdir=x"], "/no/such/folder.npy"),
]

FORK = """
import os, sys, json
from experiments import cli, train
for argv in json.loads(sys.argv[1]):
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if not pid:
        os.dup2(1, 2)
        sys.argv = ["train", *argv]
        cli.run(train.main, train.flags)
        os._exit(0)
    print("rc", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.mark.long
def test_mistakes_are_answered_in_one_screen_with_code_2():
    import json

    done = subprocess.run(
        [sys.executable, "-c", FORK, json.dumps([argv for argv, _ in MISTAKES])],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    answers = done.stdout.split("rc ")
    assert len(answers) == len(MISTAKES) + 1, done.stdout + done.stderr
    texts = [answers[0], *(a.partition("\n")[2] for a in answers[1:])]
    for (argv, expected), text, code in zip(MISTAKES, texts, [a.partition("\n")[0] for a in answers[1:]]):
        assert code == "2", (argv, text)
        assert expected in text and "Traceback" not in text and text.count("\n") <= 10, (argv, text)
        assert text.startswith("error: "), (argv, text)
    assert not (ROOT / "x").exists()


def test_dry_run_as_a_process_touches_no_data_and_no_workdir(tmp_path):
    flags = [DIGITS + ":low_rank(rank=4)", "--dry_run", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *flags],
        cwd=ROOT,
        env=environment() | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "layers_0",
        "low_rank(rank=4)",
        "768",
        "8,192",
        "10.67x",
        "FLOPs per image",
        "memory of the compiled",
    ):
        assert expected in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_scanned_layers_sharding_and_optimiser_bytes(tmp_path, monkeypatch):
    config = small_lm(tmp_path / "missing", structure="low_rank(rank=2) + random_sparse(density=0.125)")
    config.model.layers = 2
    config.mesh.update(data=2, fsdp=2, tensor=2)
    monkeypatch.setattr(dry_run, "compile_step", lambda task, step, template, mesh: NoMemory())
    out = io.StringIO()
    dry_run.dry_run(config, Console(file=out, width=220))
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[1:-1]]
        for line in out.getvalue().splitlines()
        if "│" in line
    }
    up = rows["layers_0to1/mlp/up"]
    per_layer = 2 * (16 + 64) + 64 * 2
    assert up[1] == "2 x 16 x 64" and up[3] == str(2 * per_layer) and up[4] == "2,048"
    assert up[5] == f"{1024 / per_layer:.2f}x" and up[7] == f"{2 * 2 * per_layer * 4 / 1024:.1f} KiB"
    assert "fsdp" in up[6] and "tensor" in up[6]
    assert "mesh: data=2, fsdp=2, tensor=2" in out.getvalue() and "does not tell" in out.getvalue()


class NoMemory:
    def memory_analysis(self):
        return None


def test_dry_run_totals_are_the_parameters_of_the_run():
    out = io.StringIO()
    config = small_digits()
    dry_run.dry_run(config, Console(file=out, width=160))
    total = 64 * 16 + 16 + 16 * 10 + 10
    assert f"{total:,}" in out.getvalue()
