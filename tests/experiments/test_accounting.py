"""Parameters of papers' models, counted: the figures the papers and their code give."""

import pytest
from rich import box

from experiments.accounting import ENTRIES, counted, report, table
from structmat.training.record import Record
from tests.marks import mostly_long

SIZES = {
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}
"""Width, hidden size and layers of the LLaMA models of the GaLore and SLTrain papers; 32,000 tokens, head not tied."""


def by_hand(size, rank, density):
    """Parameters: factors and values of seven matrices a layer, embedding, head, and norms."""
    d, hidden, layers = SIZES[size]
    shapes = [(d, d)] * 4 + [(d, hidden)] * 2 + [(hidden, d)]
    values = [round(density * a) * b for a, b in shapes]
    factors = [rank * (a + b) for a, b in shapes] if rank else [a * b for a, b in shapes]
    return layers * (sum(factors) + sum(values) + 2 * d) + 2 * 32_000 * d + d, layers * sum(values)


LLAMA = [entry for entry in ENTRIES if "llama" in entry.config]


@pytest.mark.parametrize("entry", mostly_long(LLAMA, LLAMA[2:3]), ids=lambda e: f"{e.config[17:]}-{e.structure}")
def test_counts_are_those_worked_out_by_hand(entry):
    """43.5, 96.5, 194.3 and 645.4 M for SLTrain, as with the scripts of its repository."""
    number = lambda name: float(entry.structure.split(f"{name}=")[1].split(")")[0]) if name in entry.structure else 0
    row = counted(entry)
    assert (row["params"], row["indices"]) == by_hand(entry.config[17:], int(number("rank")), number("density"))
    assert row["bf16_bytes"] == 6 * row["params"] + 4 * row["indices"]
    assert row["long_index_bytes"] - row["bf16_bytes"] == 4 * row["indices"]
    if entry.memory:
        assert row["long_index_bytes"] / 1e9 == pytest.approx(entry.memory, abs=0.1)


@pytest.mark.parametrize("entry", mostly_long([e for e in ENTRIES if e.params], ENTRIES[1:6:4]))
def test_the_papers_counts_come_out(entry):
    off = 0.045 if entry.config == "configs/vit.py:s768" and entry.structure != "dense()" else 0.015
    assert counted(entry)["params"] / 1e6 == pytest.approx(entry.params, rel=off)


@pytest.mark.long
def test_the_page_has_both_columns(tmp_path):
    rows = [counted(entry) for entry in ENTRIES[:2]]
    record = Record.create(name="x", kind="tables", config={}, structures={"a": "dense()"}, seed=0, data_hash="",
                           seconds=1.0, metrics={})  # fmt: skip
    report(rows, tmp_path / "x.json", record)
    page = (tmp_path / "x.md").read_text()
    assert "71.4" in page and " 72 " in page and "0.573" in page
    assert len(table(rows, box.MARKDOWN).columns) == 12
