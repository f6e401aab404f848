"""The matrix of pods: every row is a valid config of its pod, is compiled once per program, and is told in the table."""

import dataclasses
import shlex
from types import SimpleNamespace

import pytest
from absl import app
from rich import box

from experiments import pod_matrix
from experiments.pod_step import VERSION
from experiments.pod_table import best, name_of, outdated, report, table, verdict
from structmat.parallel import Sent
from structmat.parallel.mesh import mesh_shape
from structmat.structures import parse
from structmat.training.errors import ConfigError
from structmat.training.record import Record
from tests.experiments.test_pod import some_account

ROW = "llama 60m, monarch, v5e:4x4, fsdp"


@pytest.fixture
def compiled(monkeypatch):
    """Programs compiled, in order; a program is its config's structure and mesh."""
    made = []

    def lower(config, pod):
        if "kronecker" in config.structure:
            raise ConfigError("structure", config.structure, "does not fit")
        return SimpleNamespace(program=f"{config.structure} {config.mesh.tensor} {pod}")

    def account(step):
        made.append(step.program)
        wire = 400 if "tensor" in step.program else 100
        sent = [Sent("all-gather", ("fsdp",), 8, 1, 500, wire)]
        return some_account(fits=True, program=step.program, sent=sent, network=wire / 100)

    monkeypatch.setattr(pod_matrix, "lower", lower)
    monkeypatch.setattr(pod_matrix, "account", account)
    return made


def test_rows_are_kept_and_a_program_is_compiled_once(compiled, tmp_path, capsys):
    out = tmp_path / "m.json"
    rows = pod_matrix.run(out, 1.0, "llama 60m")
    assert len(rows) == 12 and len(compiled) == 10 and sum("refused" in r for r in rows) == 2
    assert "does not fit" in capsys.readouterr().out
    assert pod_matrix.run(out, 1.0, "llama 60m") == rows and len(compiled) == 10
    more = pod_matrix.run(out, 1.0, "llama 130m, dense")
    assert len(more) == 14 and len(compiled) == 10  # here the same programs as of 60m
    assert pod_matrix.run(out, 0.0, "llama 7b") == more
    report(more, out, Record.read(out), pod_matrix.command_of(rows[0]))
    page = out.with_suffix(".md").read_text()
    assert "12 steps compiled; 12 fit." in page and "Refused: llama 60m, kronecker" in page and "Nothing ran" in page
    with pytest.raises(app.UsageError, match="is in no row"):
        pod_matrix.run(out, 1.0, "lamma")


def row(**changes):
    made = dataclasses.asdict(some_account(fits=True, sent=[Sent("all-reduce", ("data",), 2, 1, 8, 8)], **changes))
    head = {"config": "configs/llama.py:60m", "structure": "monarch", "topology": "v5e:4x4", "layout": "fsdp"}
    return head | made | {"mfu": [0.5, 0.4], "sent": [{"wire": 8 * 2**20}]}


def test_the_table_compares_with_dense_and_names_the_better_layout():
    dense, tensor = row(peak=2**30) | {"structure": "dense"}, row(network=0.5, peak=2**29) | {"layout": "tensor"}
    rows = [dense, row(peak=2**29), tensor]
    assert best(rows) == {name_of(dense), name_of(tensor)} and name_of(rows[1]) == ROW
    lines = table(rows, box.MARKDOWN)
    cells = {column.header: list(column.cells) for column in lines.columns}
    assert cells["memory saved"] == ["1.00x", "2.00x", "-"] and cells["layout"] == ["fsdp*", "fsdp", "tensor*"]
    off = verdict([row(off_plan=["a"]), row() | {"fits": False}])
    assert "all but " + ROW in off[0] and ROW in off[1]


def test_rows_of_an_older_count_are_told():
    old = row() | {"mesh": {"data": 2, "fsdp": 4}, "version": 1}
    assert outdated(old) and "were counted by an older version" in " ".join(verdict([old]))
    assert not outdated(old | {"version": VERSION}) and not outdated(old | {"mesh": {"data": 1, "fsdp": 8}})
    assert not outdated(old | {"fits": False}) and not outdated({"refused": "x"})


def test_every_planned_row_is_a_config_a_mesh_and_a_command():
    rows = pod_matrix.plan()
    assert len({name_of(r) for r in rows}) == len(rows) == 11 * 6 * 2
    for text in pod_matrix.STRUCTURES.values():
        assert parse(text)
    shapes = [mesh_shape(pod_matrix.mesh_of(t, "tensor"), n) for t, n in (("v5e:4x4", 16), ("v5p:8x8x8", 512))]
    assert shapes == [(1, 1, 4, 4), (1, 2, 64, 4)]
    words = shlex.split(pod_matrix.command_of(rows[-1]))
    assert words[:3] == ["python", "-m", "experiments.pod"] and f"--config={rows[-1]['config']}" in words
