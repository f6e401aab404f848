"""The table of layouts: every family has its row, and a row that leaves its plan is told."""

from types import SimpleNamespace

import pytest
from rich import box

from experiments import pod_families
from experiments.pod_families import in_tiles, judged, real_families, report, run, table
from experiments.pod_step import VERSION
from structmat.structures import FAMILIES
from structmat.training.record import Record
from tests.experiments.test_pod import some_account

ROW = {
    "family": "monarch", "structure": "monarch(blocks=4)", "params": 10, "leaves": 3, "whole": 800, "planned": 200,
    "compiled": 260, "padded": 300, "replicated": [], "off_plan": [], "kernels": {}, "compile_seconds": 1.0, "version": VERSION,
    "sent": [{"kind": "all-reduce", "axes": ["data", "fsdp"], "wire": 2**20}],
}  # fmt: skip


@pytest.mark.long
def test_every_real_family_is_a_valid_config():
    families = real_families()
    assert set(FAMILIES) - set(families) == {"fourier"}
    assert (
        families["diagonal"] == ".*/attn/.* -> diagonal()" and families["monarch"] == FAMILIES["monarch"].about.example
    )
    assert families["dct"] == ".*/attn/[kv] -> dct()"
    assert families["householder"] == ".*/(attn/[kv]|mlp/up) -> householder(reflections=16)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"compiled": 199}, "take 199 bytes of a chip, planned 200 to 300"),
        ({"compiled": 301}, "planned 200 to 300"),
        ({"replicated": ["params/a"]}, "params/a is whole on every chip"),
        ({"off_plan": ["params/b"]}, "params/b is laid out otherwise"),
    ],
)
def test_rows_are_judged(change, said):
    assert said in judged(ROW | change) and bool(judged(ROW | change)) == bool(said)


def test_arrays_in_tiles():
    sizes = {(): 1024, (1025,): 2048, (8, 128): 1024, (9, 1): 2048, (3, 4, 200): 3 * 8 * 256}
    assert {shape: in_tiles(shape) for shape in sizes} == sizes


@pytest.mark.long
def test_rows_are_kept_and_the_table_says_what_left_its_plan(monkeypatch, tmp_path, capsys):
    made = []

    def compiled(family, structure):
        made.append(family)
        fault = ["params/w"] if family == "kronecker" else []
        return ROW | {"family": family, "structure": structure, "off_plan": fault}

    monkeypatch.setattr(pod_families, "compiled", compiled)
    out = tmp_path / "f.json"
    assert run(out, 0.0, False) == [] and not out.exists()
    rows = run(out, 1.0, False)
    assert made == list(real_families()) and run(out, 1.0, False) == rows and len(made) == len(rows)
    assert len(run(out, 1.0, True)) == len(made) / 2
    report(rows, out, Record.read(out))
    page = out.with_suffix(".md").read_text()
    assert f"{len(rows) - 1} of {len(rows)} families are laid out as planned" in page and "kronecker: params/w" in page
    cells = {column.header: next(iter(column.cells)) for column in table(rows, box.MARKDOWN).columns}
    assert cells["MiB sent over data"] == cells["MiB sent over fsdp"] == "1.0" and cells["state of a chip"] == "25%"
    assert cells["MiB sent over tensor"] == "0.0"


def test_a_family_that_does_not_fit_is_an_error(monkeypatch):
    monkeypatch.setattr(pod_families, "lower", lambda config, pod: SimpleNamespace())
    monkeypatch.setattr(pod_families, "account", lambda step: some_account())
    with pytest.raises(RuntimeError, match="monarch: does not fit"):
        pod_families.compiled("monarch", "monarch(blocks=4)")
