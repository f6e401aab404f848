"""The command: weights of a tiny run and of files, read singly, and what is written."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.choose import run
from structmat import Rules, StructureError
from structmat.analysis.choices import Choices
from structmat.nn.sites import site_params
from structmat.training.load import load_run, stored_weights
from structmat.training.loop import train
from structmat.training.record import Record
from tests.training.small_runs import small_lm, write_corpus

ROOT = Path(__file__).parents[2]
MLP = ["layers_0/mlp/down", "layers_1/mlp/down", "layers_0/mlp/up", "layers_1/mlp/up"]
TRIED = ["low_rank()", "monarch()", "kronecker()"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choose")
    config = small_lm(write_corpus(folder / "text"), steps=2)
    config.model.layers = 2
    config.structure = "layers_[0-9]+/attn/q -> frozen(dense()) + low_rank(rank=2)"
    train(config, folder / "run")
    return folder / "run"


def test_weights_of_a_run_are_those_of_the_loaded_model(workdir):
    loaded, stored = load_run(workdir), stored_weights(workdir)
    assert stored.step == 2 and len(stored.readers) == 12 and "embed" not in stored.readers
    for path, read in stored.readers.items():
        site = stored.table[path]
        np.testing.assert_array_equal(read(), site.bound.materialize(site_params(loaded.variables, path, site)))
    last, first = list(stored.readers.items())[-1], next(iter(stored.readers.items()))
    np.testing.assert_array_equal(first[1](), first[1](), "in any order, again")
    assert last[1]().shape == (stored.table[last[0]].bound.d_in, stored.table[last[0]].bound.d_out)


def test_a_stored_stack_is_read_once_and_one_at_a_time(workdir, monkeypatch):
    from structmat.training.checkpoint import Checkpointer

    reads, original = [], Checkpointer.read
    stacked = lambda: sum(a.shape in ((2, 16, 64), (2, 64, 16)) for a in jax.live_arrays())

    def counted(self, step, names):
        reads.append((stacked(), *names))
        return original(self, step, names)

    monkeypatch.setattr(Checkpointer, "read", counted)
    stored = stored_weights(workdir, "layers_.*/mlp/.*")
    assert list(stored.readers) == MLP and not reads, "layers of one array follow one another; nothing is read yet"
    for read in stored.readers.values():
        read()
    names = [f"params/layers_0to1/mlp/{n}/kernel" for n in ("down", "up")]
    assert reads == [(0, names[0]), (0, names[1])]
    assert stacked() == 0


def test_report(workdir, tmp_path, capsys):
    stored = stored_weights(workdir, "layers_.*/mlp/.*")
    choices, record = run(stored.readers, [0.1, 0.5], tmp_path, source={"workdir": "w"}, structures=TRIED)
    assert choices.paths == tuple(MLP) and len(choices.rows) == 4 * 3 * 2
    assert Record.read(tmp_path / "choose.json") == record
    assert record.kind == "choose" and record.config["budgets"] == [0.1, 0.5] and len(record.data_hash) == 64
    assert record.structures["layers_0/mlp/up at 0.5"] == choices.best("layers_0/mlp/up", 0.5).structure
    rows = json.loads(json.dumps(record.metrics["rows"]))
    fields = {"rows": rows, "metric": "bits", "budgets": [0.1, 0.5]}
    assert Choices.from_json(json.dumps(fields)) == choices
    text = (tmp_path / "table.md").read_text()
    assert all(s in text for s in (*MLP, *TRIED, "## What does not fit", "monarch(): fit: bits=0.1", "| low_rank()"))
    rules = text.split("- bits 0.5: `")[1].split("`")[0]
    chosen = Rules.of(rules).resolve({p: s.kind for p, s in stored.table.items()})
    assert all(str(chosen[p]) == choices.best(p, 0.5).structure for p in MLP)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "[4/4] layers_1/mlp/up (16, 64)  0.1: " in capsys.readouterr().out
    again, other = (
        run(r, [0.5], tmp_path / "b", source={}, structures=TRIED[:1])[1].data_hash
        for r in (stored.readers, dict([*stored.readers.items()][:1]))
    )
    assert again == record.data_hash != other


def test_near_paths_are_listed(workdir):
    with pytest.raises(StructureError, match=r"'layer_.*/up' matches no path; near: layers_1/mlp/up, layers_0/mlp/up"):
        stored_weights(workdir, "layer_.*/up")


def command(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.choose", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command_on_files(tmp_path):
    for name in ("up", "down"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(len(name)).normal(size=(16, 24)).astype(np.float32))
    np.save(tmp_path / "bias.npy", np.ones(3))
    code, text = command(
        f"--files={tmp_path}", "--transpose", "--budgets=0.5", "--structure=low_rank()", f"--out={tmp_path / 'out'}"
    )
    assert code == 0, text
    assert "left out: bias: shape (3,)" in text and "[2/2] up (24, 16)" in text and "low_rank(rank=4)" in text
    assert Record.read(tmp_path / "out" / "choose.json").config["left_out"] == ["bias: shape (3,)"]


def test_what_the_user_got_wrong_is_told(tmp_path):
    code, text = command(f"--workdir={tmp_path}", "--budgets=0.5")
    assert code == 2 and "holds no run" in text and "Traceback" not in text
