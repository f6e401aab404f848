"""The command: what it lists, sweeps and refuses."""

import contextlib
import dataclasses

import jax
import pytest
from absl import app

from experiments.tables import __main__ as command
from experiments.tables import bases
from experiments.tables.schema import TableError
from tests.experiments.tables.test_tables import TABLE, TINY


@contextlib.contextmanager
def flags(**values):
    """Flag values for a while."""
    held = command.flags.FLAGS
    held.mark_as_parsed()
    old = {name: held[name].value for name in values}
    try:
        for name, value in values.items():
            held[name].value = value
        yield
    finally:
        for name, value in old.items():
            held[name].value = value


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command with two small tables that share their runs, in an empty folder."""
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    tables = {"tiny": TABLE, "other": dataclasses.replace(TABLE, name="other")}
    monkeypatch.setattr(command, "TABLES", tables)
    monkeypatch.setattr(command, "table_of", lambda name: tables[name])
    with flags(out=str(tmp_path / "out"), runs=str(tmp_path / "runs")):
        yield


def test_it_lists_what_there_is_and_what_is_missing(tiny, capsys, tmp_path):
    command.main(["tables", "list"])
    assert "none yet" in capsys.readouterr().out
    other = tmp_path / "out" / "cpu" / "runs" / "of_another_table.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    command.main(["tables", "list"])
    out = capsys.readouterr().out
    assert "A tiny table" in out and "0/6+" in out and "0 / 0 / 2" in out


def test_a_sweep_names_every_missing_run_once(tiny, capsys):
    with flags(sweep="print"):
        command.main(["tables", "run", "all"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6 and shown[0].startswith("0 ") and "tiny: dense, rate x0.5" in shown[0]
    with flags(sweep="commands"):
        command.main(["tables", "run", "tiny"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"python -m experiments.tables run tiny --scale=cpu --only={shown[0].split()[1]}"


def test_one_run_alone(tiny, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(command, "execute", lambda run, *rest: made.append(run.label) or True)
    with flags(sweep="print"):
        command.main(["tables", "run", "tiny"])
    key = capsys.readouterr().out.splitlines()[1].split()[1]
    with flags(only=key):
        command.main(["tables", "run", "tiny"])
    assert made == ["dense, rate x1"]
    with flags(only="abc"), pytest.raises(SystemExit):
        command.main(["tables", "run", "tiny"])
    assert "no such run is missing" in capsys.readouterr().err


@pytest.mark.parametrize("own", [None, "of_the_user"])
def test_runs_share_compiled_programs(tiny, tmp_path, monkeypatch, own):
    monkeypatch.setattr(command, "run_table", lambda *_: False)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", own)
        command.run(list(command.TABLES.values()))
        assert jax.config.jax_compilation_cache_dir == (own or str(tmp_path / "runs" / "programs"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_table_without_runs_is_shown(tiny, capsys):
    command.main(["tables", "show", "tiny"])
    out = capsys.readouterr().out
    assert "paper: accuracy" in out and "not decided, no runs yet" in out and "No runs yet." in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a command"),
        (["lst"], "list"),
        (["run"], "needs a table"),
        (["report", "tiny"], "takes no table"),
    ],
)
def test_wrong_words(words, said):
    with pytest.raises(app.UsageError, match=said):
        command.main(["tables", *words])


def test_budgets():
    assert [command.seconds_of(t) for t in ("45s", "60m", "1.5h", "")] == [45, 3600, 5400, float("inf")]
    with pytest.raises(TableError, match="not a time"):
        command.seconds_of("an hour")
