"""Configs at the papers' own scale: what they are, and that each arm's step is compiled once."""

import dataclasses

import pytest

from experiments.tables import check as checking
from experiments.tables.bases import BASES
from experiments.tables.plan import arms_of, plan
from experiments.tables.registry import TABLES
from experiments.tables.schema import DENSE, TableError
from experiments.tables.store import Store
from structmat.data.errors import DataError
from structmat.training.config import validate
from structmat.training.switch import ended

PAPER = [table for table in TABLES.values() if "paper" in table.bases]


def configs(name):
    return {arm.name: config for arm, config in arms_of(TABLES[name], "paper")}


@pytest.mark.long
def test_the_papers_own_sizes_and_schedules():
    small = configs("monarch")["monarch"]
    assert (small.model.width, small.batch, small.model.context, small.optim.lr) == (768, 512, 1024, 6e-4)
    assert small.steps == 22506 and not small.mup.enabled and small.data.root == "data/wikitext103/tokens"
    own = configs("sltrain")
    assert own["sltrain"].structure == (
        "scaled(low_rank(rank=128, init='paper'), s=0.25) + random_sparse(density=0.03, init='paper')"
    )
    assert (own["sltrain"].optim.lr, own["sltrain"].steps, own[DENSE].structure) == (3e-3, 11_000, "dense()")
    assert own["sltrain, 8-bit moments"].optim.name == "adamw_8bit"
    own = configs("sst")
    assert (own["sst"].structure, own["sst"].steps, own["low rank"].structure) == (
        "sst(rank=64)",
        37574,
        "low_rank(rank=64)",
    )
    assert own["sst, cut"].method == own["sst"].method == "sst(every=200, warmup=20)"


@pytest.mark.long
def test_the_papers_own_image_models():
    own = configs("trp")
    sizes = {name: ended(config, validate(config, devices=1)).params for name, config in own.items()}
    assert sizes[DENSE] == 272_474 and {round(sizes[name] / 1e6, 2) for name in own if "TRP" in name} == {0.1}
    assert (own["TRP + Nu"].optim.name, own["TRP + Nu"].optim.schedule, own["TRP + Nu"].steps) == (
        "sgd",
        "steps",
        64062,
    )
    own = configs("rigl")
    tasks = {name: validate(config, devices=1) for name, config in own.items()}
    dense, sparse = tasks[DENSE].table, tasks["RigL"].table
    masked = {path: site.bound for path, site in sparse.items() if site.bound.structure.name == "masked"}
    kept = sum(bound.pattern.count for bound in masked.values())
    whole = sum(site.bound.dense_params for path, site in dense.items() if path != "stem/conv")
    assert kept + sum(sparse[p].bound.params for p in sparse if p not in masked and p != "stem/conv") == pytest.approx(
        0.05 * whole, rel=1e-3
    )
    assert own["RigL"].steps == 5 * own[DENSE].steps == 160_000
    own = configs("sparse_ift")
    flops = {name: validate(config, devices=1).flops() for name, config in own.items() if "%" in name}
    assert max(abs(f / 3.6281e9 - 1) for f in flops.values()) < 0.005
    assert own["wide 90%, RigL"].method == "rigl(every=100)" and own["wide 90%, RigL"].model.width == 202
    own = configs("maestro")
    assert own["maestro"].method == "maestro(every=390, lasso=1e-06)" and own["maestro"].eval.recalibrate == 390
    assert {round(validate(own[n], devices=1).params / 1e6, 1) for n in ("dense small", "low rank")} == {2.0}


@pytest.mark.long
def test_runs_at_that_scale_ask_for_the_data(tmp_path):
    with pytest.raises(DataError, match="data/wikitext103/tokens"):
        plan(TABLES["monarch"], "paper", Store(tmp_path, "paper"))


def test_every_scale_of_every_table_has_a_base_and_paper_ones_a_pod():
    for table in TABLES.values():
        for scale, name in table.bases.items():
            assert bool(BASES[scale, name].pod) == (scale == "paper")
    assert {
        "monarch",
        "monarch_s2d",
        "sltrain",
        "lost",
        "sst",
        "structure_rates",
        "kronecker",
        "btt_moe_lm",
        "trp",
        "rigl",
        "maestro",
        "sparse_ift",
    } <= {table.name for table in PAPER}


@dataclasses.dataclass
class Step:
    program: str


class Found:
    def __init__(self, step):
        self.step = step

    def row(self):
        numbers = dict.fromkeys(("compute", "memory", "network", "peak", "params"), 1.0)
        return numbers | {"fits": True, "program": self.step.program, "pod": "v5e:4x4", "hbm": 2.0, "mfu": [0.5, 0.4]}


@pytest.mark.long
def test_rows_are_kept_and_equal_programs_are_compiled_once(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(checking, "lower", lambda config, pod: Step(f"{config.structure} on {pod}"))
    monkeypatch.setattr(checking, "account", lambda step: (compiled.append(step.program), Found(step))[1])
    out = tmp_path / "paper" / "check.json"
    table = TABLES["monarch_s2d"]
    assert checking.check([table], "paper", out, 0) == []
    rows = checking.check([table], "paper", out, 10)
    assert [r["arm"] for r in rows] == [arm.name for arm, _ in arms_of(table, "paper")]
    assert len(compiled) == len(set(compiled)) < len(rows) and all(p.endswith("v5e:4x4") for p in compiled)
    assert checking.check([table], "paper", out, 10) == rows and len(compiled) == len(set(compiled))
    head, grid, tail = checking.page(rows, checking.Record.read(out))
    assert tail == f"{len(rows)} of {len(rows)} fit." and len(grid.rows) == len(rows) and "nothing ran" in head
    with pytest.raises(TableError, match="table householder has no scale 'paper'"):
        checking.check([TABLES["householder"]], "paper", out, 10)
    with pytest.raises(TableError, match="runs at scale cpu need no pod"):
        checking.check([TABLES["rigl"]], "cpu", out, 10)
