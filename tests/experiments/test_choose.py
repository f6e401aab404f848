"""The command: weights of a tiny run and of files, read singly, and what is written."""

import functools
import json
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.choose import choices_of, run
from structmat import Rules, StructureError, choose
from structmat.nn.sites import site_params
from structmat.training.errors import RunError
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


@pytest.mark.long
def test_weights_of_a_run_are_those_of_the_loaded_model(workdir):
    loaded, stored = load_run(workdir), stored_weights(workdir)
    assert stored.step == 2 and len(stored.readers) == 12 and "embed" not in stored.readers
    for path, read in stored.readers.items():
        site = stored.table[path]
        np.testing.assert_array_equal(read(), site.bound.materialize(site_params(loaded.variables, path, site)))
    last, first = list(stored.readers.items())[-1], next(iter(stored.readers.items()))
    np.testing.assert_array_equal(first[1](), first[1](), "in any order, again")
    assert last[1]().shape == (stored.table[last[0]].bound.d_in, stored.table[last[0]].bound.d_out)


@pytest.mark.long
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


@pytest.fixture(scope="module")
def finished(workdir, tmp_path_factory):
    folder, stored = tmp_path_factory.mktemp("out") / "mine", stored_weights(workdir, "layers_.*/mlp/.*")
    return folder, stored, run(stored.readers, [0.5, 0.1], folder, source={"workdir": "w"}, structures=TRIED)


@pytest.mark.long
def test_report(finished):
    folder, stored, record = finished
    choices = choices_of(record)
    assert choices.paths == tuple(MLP) and choices.budgets == (0.1, 0.5) and len(choices.rows) == 4 * 3 * 2
    assert Record.read(folder / "choose.json") == record and record.metrics["left"] == 0
    assert record.kind == "choose" and list(record.metrics["weights"]) == MLP and len(record.data_hash) == 64
    assert record.structures["layers_0/mlp/up at 0.5"] == choices.best("layers_0/mlp/up", 0.5).structure
    whole = choose({p: read() for p, read in stored.readers.items()}, [0.1, 0.5], structures=TRIED)
    pick = lambda c: {(r.path, r.candidate, r.budget): (r.structure, r.error) for r in c.rows}
    assert pick(whole) == pick(choices)
    text = (folder / "table.md").read_text()
    assert all(s in text for s in (*MLP, *TRIED, "## What does not fit", "monarch(): fit: bits=0.1", "| low_rank()"))
    rules = text.split("- bits 0.5: `")[1].split("`")[0]
    chosen = Rules.of(rules).resolve({p: s.kind for p, s in stored.table.items()})
    assert all(str(chosen[p]) == choices.best(p, 0.5).structure for p in MLP)
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.long
def test_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    _, stored, record = finished
    again = lambda **k: run(stored.readers, [0.1, 0.5], tmp_path, source={"workdir": "w"}, structures=TRIED, **k)
    first = again(minutes=0.0)
    assert first.metrics["left"] == 22 and list(first.metrics["weights"]) == MLP[:1], "one candidate at least"
    last = again()
    assert last.metrics["left"] == 0 and last.seconds > first.seconds and last.data_hash == record.data_hash
    errors = lambda r: [(row["path"], row["candidate"], row["error"]) for row in r.metrics["rows"]]
    assert errors(last) == errors(record) and last.metrics["rows"][:2] == first.metrics["rows"]
    more = [*TRIED[1:], "diagonal()"]
    wider = run(stored.readers, [0.1, 0.5], tmp_path, source={"workdir": "w"}, structures=more)
    assert {row["candidate"] for row in wider.metrics["rows"]} == set(more), "candidates come and go"
    assert [e for e in errors(wider) if e[1] in TRIED] == [e for e in errors(record) if e[1] in more]
    last.write(tmp_path / "choose.json")
    monkeypatch.setattr("experiments.choose.choose", lambda *a, **k: pytest.fail("projected again"))
    assert errors(again()) == errors(record)


def test_one_weight_is_in_memory_at_a_time(tmp_path):
    refs, alive = [], []

    def read(seed):
        alive.append(sum(ref() is not None for ref in refs))
        w = np.random.default_rng(seed).normal(size=(16, 24)).astype(np.float32)
        refs.append(weakref.ref(w))
        return w

    run({str(i): functools.partial(read, i) for i in range(3)}, [0.5], tmp_path, source={}, structures=TRIED[:1])
    assert alive == [0, 0, 0]


@pytest.mark.long
def test_another_choice_in_the_folder_is_refused(finished):
    folder, stored, _ = finished
    with pytest.raises(RunError, match=r"holds another choice \(other budgets, workdir\); give another --out"):
        run(stored.readers, [0.1], folder, source={"workdir": "v"}, structures=TRIED)
    changed = {"layers_0/mlp/down": lambda: 2 * stored.readers["layers_0/mlp/down"]()}
    first = json.loads((folder / "choose.json").read_text())
    first["metrics"]["rows"] = first["metrics"]["rows"][2:]
    (folder.parent / "cut").mkdir()
    (folder.parent / "cut" / "choose.json").write_text(json.dumps(first))
    with pytest.raises(RunError, match="was made from another weight 'layers_0/mlp/down'"):
        run(changed, [0.1, 0.5], folder.parent / "cut", source={"workdir": "w"}, structures=TRIED)


@pytest.mark.long
def test_near_paths_are_listed(workdir):
    with pytest.raises(StructureError, match=r"'layer_.*/up' matches no path; near: layers_1/mlp/up, layers_0/mlp/up"):
        stored_weights(workdir, "layer_.*/up")


def command(*flags):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.choose", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_the_command_on_files(tmp_path):
    for name in ("up", "down"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(len(name)).normal(size=(16, 24)).astype(np.float32))
    np.save(tmp_path / "bias.npy", np.ones(3))
    code, text = command(
        f"--files={tmp_path}", "--transpose", "--budgets=0.5", "--structure=low_rank()", f"--out={tmp_path / 'out'}"
    )
    assert code == 0, text
    assert "left out: bias: shape (3,)" in text and "[2/2] up  0." in text and "low_rank(rank=4)" in text
    assert Record.read(tmp_path / "out" / "choose.json").config["left_out"] == ["bias: shape (3,)"]


@pytest.mark.long
def test_what_the_user_got_wrong_is_told(tmp_path):
    code, text = command(f"--workdir={tmp_path}", "--budgets=0.5")
    assert code == 2 and "holds no run" in text and "Traceback" not in text
