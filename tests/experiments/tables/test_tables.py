"""A table from its data to its page: which runs it needs, that they are made once, and what is said of them."""

import dataclasses
import json

import pytest

from experiments.tables import bases, report, runner, timing
from experiments.tables import plan as planning
from experiments.tables.bases import Base
from experiments.tables.plan import TUNE_SEED, Run, best_rate, key_of, plan
from experiments.tables.registry import TABLES, table_of
from experiments.tables.results import cost_of, results_of
from experiments.tables.runner import missing, run_table
from experiments.tables.schema import DENSE, LOW_RANK, SMALL, Arm, Claim, Table, TableError
from experiments.tables.show import conditions, tuning, verdicts
from experiments.tables.store import Store
from experiments.tables.summary import BEGIN, END, within
from structmat.training.config import default, validate
from structmat.training.errors import Interrupted, RunError
from structmat.training.record import Record


def small():
    config = default("digits")
    config.update(steps=6, batch=16)
    config.model.update(width=32, layers=2)
    config.mup.base_width = 32
    return config


TINY = Base(small, "loss", others=("accuracy",), seeds=3, rates=(0.5, 1.0), further=0)
TABLE = Table(
    name="tiny",
    title="A tiny table",
    citation="Nobody, 2026",
    bases={"cpu": "tiny"},
    arms=(
        Arm("monarch", {"structure": "monarch(blocks=4)"}, paper={"accuracy": 99.0}, note="4 blocks"),
        Arm("monarch, decayed", {"structure": "monarch(blocks=4)", "optim.weight_decay": 0.3}, tuned_with="monarch"),
    ),
    reference="monarch",
    columns={"accuracy": "accuracy, %"},
    baselines_paper={DENSE: {"accuracy": 99.5}},
    claims=(
        Claim("Monarch beats low rank", "Table 1", "monarch", LOW_RANK),
        Claim("Decay does not hurt", "Table 2", "monarch, decayed", "monarch", within=0.1),
    ),
)


OWN_AT_GPU = ("sltrain", "sst", "monarch_flow", "monarch_mri", "monarch_mri_few", "mg_tfno")
"""Tables with changes of their own at gpu scale; to size the others' models takes long."""


@pytest.fixture
def trained(monkeypatch):
    """Runs made, by label; a run's loss is 0.1 worse per seed and 0.5 worse for low rank, and rate 0.5 diverges."""
    made = []

    def train(config, folder, name=None):
        made.append(name)
        folder.mkdir(parents=True)
        if config.seed == TUNE_SEED and config.optim.lr < 3e-3:
            raise RunError("stopped at step 3: 10 steps in a row (max_skips) had a non-finite loss")
        loss = 1.0 + 0.1 * config.seed + 0.5 * ("low_rank" in config.structure) + 0.01 * config.optim.weight_decay
        return Record.create(
            name=name, kind="train", config=json.loads(config.to_json()), structures={}, seed=config.seed, data_hash="d",
            seconds=2.0, metrics={"heldout": {"loss": loss, "accuracy": 0.5}, "step_seconds": 0.01, "step_bytes": 2**20,
                                  "data": "digits", "reference": {"majority_loss": 1.2, "majority_accuracy": 0.1}},
        )  # fmt: skip

    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    monkeypatch.setattr(runner, "train", train)
    return made


def test_rates_first_then_every_seed_each_once(trained, tmp_path):
    store, runs = Store(tmp_path / "out", "cpu"), tmp_path / "runs"
    first = missing(TABLE, "cpu", store)
    assert len(first) == 6 and all(r.config.seed == TUNE_SEED and r.config.steps == 2 for r in first)
    assert run_table(TABLE, "cpu", store, runs, 60)
    assert len(trained) == len(set(trained)) == 6 + 5 * 3 and missing(TABLE, "cpu", store) == []
    assert run_table(TABLE, "cpu", Store(tmp_path / "out", "cpu"), runs, 60) and len(trained) == 21
    again = dataclasses.replace(TABLE, name="other", arms=TABLE.arms[:1], claims=())
    assert run_table(again, "cpu", store, runs, 60) and len(trained) == 21  # shared by content
    assert not list(runs.glob("cpu/*"))
    found = plan(TABLE, "cpu", store)
    assert {row.rate for row in found.rows} == {1.0} and found.complete()  # the other rate diverged
    assert found.row("monarch, decayed").runs[0].config.optim.weight_decay == 0.3


def put(store, key, **metrics):
    store.write(key, Record.create(name=key, kind="train", config={}, structures={}, seed=0, data_hash="d", seconds=1.0,
                                   metrics=metrics))  # fmt: skip


@pytest.mark.parametrize(("lower", "best"), [(True, 1.0), (False, 2.0)])
def test_the_rate_is_that_of_the_best_trial(tmp_path, lower, best):
    store, trials = Store(tmp_path, "cpu"), {}
    for key, rate, loss in (("a", 0.5, 0.5), ("b", 1.0, 0.3), ("c", 2.0, 0.9)):
        trials[rate] = Run(key, key, small())
        put(store, key, heldout={"loss": loss})
    base = dataclasses.replace(TINY, lower=lower, rates=(0.5, 1.0, 2.0))
    assert best_rate(trials, base, store) == best
    assert best_rate(trials | {4.0: Run("d", "d", small())}, base, store) is None


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({0.5: 1.004, 1: 1.0, 2: 1.02}, 0.5),
        ({0.5: 1.006, 1: 1.0, 2: 1.02}, 1),
        ({1: 1.1, 2: 1.004, 4: 1.0}, 2),
        ({0.5: 1.001, 1: 1.1, 2: 1.0}, 0.5),
    ],
)
def test_of_rates_that_end_alike_the_lowest_is_taken(tmp_path, losses, best):
    store, trials = Store(tmp_path, "cpu"), {}
    for rate, loss in losses.items():
        trials[rate] = Run(str(rate), str(rate), small())
        put(store, str(rate), heldout={"loss": loss})
    assert best_rate(trials, TINY, store) == best


@pytest.mark.parametrize(
    ("losses", "tried", "rate", "edge"),
    [
        ({0.5: 2, 1: 1, 2: 3}, [0.5, 1, 2], 1, False),
        ({0.5: 3, 1: 2, 2: 1, 4: None}, [0.5, 1, 2, 4], 2, False),
        ({0.5: 3, 1: 2, 2: 1, 4: 0.5, 8: 0.2}, [0.5, 1, 2, 4, 8], 8, True),
        ({0.5: 3, 1: 1.002, 2: 1, 4: 0.5, 8: 0.499}, [0.5, 1, 2, 4, 8], 4, False),
        ({0.125: 0.9, 0.25: 0.8, 0.5: 1, 1: 2, 2: None}, [0.5, 1, 2, 0.25, 0.125], 0.25, False),
    ],
)
def test_rates_beyond_the_ends_are_tried_while_the_best_is_one(tmp_path, monkeypatch, losses, tried, rate, edge):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), dataclasses.replace(TINY, rates=(0.5, 1.0, 2.0), further=2))
    table, store = dataclasses.replace(TABLE, arms=TABLE.arms[:1], low_rank="", claims=()), Store(tmp_path, "cpu")
    while len(todo := [r for r in plan(table, "cpu", store).row("monarch").tried.values() if not store.read(r.key)]):
        for run in todo:
            loss = losses[run.config.optim.lr / small().optim.lr]
            put(store, run.key, **({"failed": "non-finite"} if loss is None else {"heldout": {"loss": loss}}))
    row = plan(table, "cpu", store).row("monarch")
    assert (list(row.tried), row.rate, row.edge) == (tried, rate, edge)
    assert row.runs[0].config.optim.lr == small().optim.lr * rate


@pytest.mark.parametrize(("part", "steps", "said"), [(1, 6, "all of the steps"), (2, 3, "1/2 of the steps")])
def test_rates_are_tried_in_a_part_of_the_steps(tmp_path, monkeypatch, part, steps, said):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), dataclasses.replace(TINY, part=part))
    found = plan(TABLE, "cpu", Store(tmp_path, "cpu"))
    assert {run.config.steps for row in found.rows for run in row.tried.values()} == {steps}
    assert f"best of 0.5, 1 in a run of {said} with another seed" in tuning(found.base, 0.1)


def test_baselines_have_no_more_parameters(monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    params = {arm.name: validate(config).params for arm, config in planning.arms_of(TABLE, "cpu")}
    assert list(params) == [DENSE, SMALL, LOW_RANK, "monarch", "monarch, decayed"]
    for name in (SMALL, LOW_RANK):
        assert 0.9 * params["monarch"] < params[name] <= params["monarch"]


def test_baselines_may_match_a_share_instead(monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    masked = Arm("masked", {"structure": "masked(dense(), unstructured(density=0.5), rule='plain')"})
    claim = Claim("x", "y", "masked", SMALL)
    with pytest.raises(TableError, match="'masked' saves nothing, so there is no 'dense small'"):
        planning.arms_of(dataclasses.replace(TABLE, arms=(masked,), reference="masked", claims=(claim,)), "cpu")
    half = dataclasses.replace(TABLE, arms=(masked,), reference="masked", claims=(claim,), share=0.5)
    params = {arm.name: validate(config).params for arm, config in planning.arms_of(half, "cpu")}
    assert params["masked"] == params[DENSE] and 0.9 * (params[DENSE] - 1536) < params[SMALL] <= params[DENSE] - 1536


def test_share_and_low_rank_may_depend_on_the_scale(monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    monkeypatch.setitem(bases.BASES, ("gpu", "tiny"), TINY)
    low_rank = {"cpu": "low_rank(rank=2)", "gpu": "low_rank(rank=3)"}
    both = dataclasses.replace(
        TABLE, bases={"cpu": "tiny", "gpu": "tiny"}, share={"cpu": 0.3, "gpu": 0.6}, low_rank=low_rank
    )
    found = {scale: {arm.name: c for arm, c in planning.arms_of(both, scale)} for scale in both.bases}
    assert [found[scale][LOW_RANK].structure for scale in low_rank] == list(low_rank.values())
    assert found["cpu"][SMALL].model.width < found["gpu"][SMALL].model.width


def test_the_page_says_what_was_found(trained, tmp_path):
    store = Store(tmp_path, "cpu")
    run_table(TABLE, "cpu", store, tmp_path / "runs", 60)
    results = results_of(plan(TABLE, "cpu", store), store)
    (_, beats), (_, decay) = verdicts(results)
    assert beats.status == "holds" and beats.gain == pytest.approx(0.5) and decay.status == "holds"
    page = report.report([TABLE], tmp_path).read_text()
    assert "2 claims; 2 hold, 0 do not, 0 are not decided" in page and "## tiny, cpu: A tiny table" in page
    assert "1.1000 ± 0.1000" not in page and "1.1010 ± 0.1000" in page  # dense: weight decay 0.1
    assert "paper: accuracy, %" in page and "99.5" in page and "- monarch: 4 blocks" in page
    assert (tmp_path / "tiny_cpu.png").stat().st_size > 1000 and "the longest 2 s" in conditions(results)


def test_out_of_time_is_gone_on_with(trained, tmp_path, monkeypatch):
    def stopped(config, folder, name=None):
        raise Interrupted("saved")

    monkeypatch.setattr(runner, "train", stopped)
    store = Store(tmp_path, "cpu")
    assert not run_table(TABLE, "cpu", store, tmp_path / "runs", 60)
    assert not run_table(TABLE, "cpu", store, tmp_path / "runs", 0) and len(missing(TABLE, "cpu", store)) == 6


def test_other_errors_are_not_results(trained, tmp_path, monkeypatch):
    def broken(config, folder, name=None):
        raise RunError("the folder cannot be written")

    monkeypatch.setattr(runner, "train", broken)
    with pytest.raises(RunError, match="written"):
        run_table(TABLE, "cpu", Store(tmp_path, "cpu"), tmp_path / "runs", 60)


def test_a_family_that_diverges_at_every_rate(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), dataclasses.replace(TINY, rates=(0.25, 0.5)))
    with pytest.raises(TableError, match="failed at every rate"):
        run_table(TABLE, "cpu", Store(tmp_path, "cpu"), tmp_path / "runs", 60)


def test_arms_share_no_part_of_their_configs():
    common = default("digits").model
    one, two = (planning.changed(small(), {"model": common, "model.width": width}, "here") for width in (4, 8))
    assert (one.model.width, two.model.width, common.width) == (4, 8, default("digits").model.width)


def test_keys_know_content_only():
    one, two = small(), small()
    assert key_of(one) == key_of(two)
    two.log_every = 3  # decides nothing that is learned
    assert key_of(one) == key_of(two)
    two.structure = "monarch(blocks = 4)"
    assert key_of(one) != key_of(two)
    one.structure = "monarch(blocks=4)"
    assert key_of(one) == key_of(two)
    two.seed = 5
    assert key_of(one) != key_of(two)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": (Arm("a"), Arm("a")), "reference": "a", "claims": ()}, "occur twice"),
        ({"reference": "monrach"}, "monarch"),
        ({"claims": (Claim("x", "y", "monarch", "dens"),)}, "dense"),
        ({"bases": {"cpus": "tiny"}}, "cpu"),
        ({"baselines_paper": {DENSE: {"acc": 1.0}}}, "no column 'acc'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change, said):
    with pytest.raises(TableError, match=said):
        dataclasses.replace(TABLE, **change)


def test_names_and_fields_are_checked(monkeypatch):
    with pytest.raises(TableError, match="monarch"):
        table_of("monarhc")
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    wrong = dataclasses.replace(TABLE, arms=(Arm("monarch", {"optim.lrr": 1.0}),), claims=())
    with pytest.raises(TableError, match=r"optim\.lrr"):
        planning.arms_of(wrong, "cpu")
    with pytest.raises(TableError, match="no scale 'gpu'"):
        plan(TABLE, "gpu", Store("x", "gpu"))


@pytest.mark.long
@pytest.mark.parametrize(("name", "scale"), [(n, "cpu") for n in TABLES] + [(n, "gpu") for n in OWN_AT_GPU])
def test_every_table_is_valid_at_our_scales(name, scale):
    for _, config in planning.arms_of(TABLES[name], scale):
        validate(config, devices=1)


def test_arms_that_switch_are_sized_as_they_are_evaluated(monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    end = Arm("cut", {"switch": "end: low_rank(rank=4)", "method": "trp(every=1)"})
    rows = dict(
        (arm.name, config)
        for arm, config in planning.arms_of(
            dataclasses.replace(
                TABLE,
                name="cut",
                arms=(end, Arm("midway", {"switch": "0.5: low_rank(rank=8)"})),
                reference="cut",
                claims=(),
            ),
            "cpu",
        )
    )
    params = {name: cost_of(config).params for name, config in rows.items()}
    assert params["cut"] == 4 * (64 + 32) + 4 * (32 + 32) + 2 * 32 + 330
    assert params["midway"] == 8 * (64 + 32) + 8 * (32 + 32) + 2 * 32 + 330 < params[DENSE]
    assert params[SMALL] <= params["cut"] and 0.9 * params["cut"] < params[LOW_RANK] <= params["cut"]


@pytest.mark.long
def test_steps_are_timed_beside_dense(trained, tmp_path):
    store = Store(tmp_path, "cpu")
    run_table(TABLE, "cpu", store, tmp_path / "runs", 60)
    assert "not timed yet" in conditions(results_of(plan(TABLE, "cpu", store), store))
    record = timing.time_table(TABLE, "cpu", store)
    times = results_of(plan(TABLE, "cpu", store), store).times
    assert times and times.over_dense.keys() == {DENSE, SMALL, LOW_RANK, "monarch", "monarch, decayed"}
    assert times.over_dense[DENSE] == 1 and all(ratio > 0 for ratio in times.over_dense.values())
    assert (
        all(row["seconds"] > 0 for row in record.metrics["rows"].values())
        and record.metrics["repeats"] >= timing.FEWEST
    )
    other = dataclasses.replace(TABLE, arms=(Arm("monarch", {"structure": "monarch(blocks=2)"}), TABLE.arms[1]))
    changed = timing.known_times(other, "cpu", store)  # low rank is sized by what has changed
    assert changed and changed.over_dense.keys() == {DENSE, "monarch, decayed"}
    assert timing.known_times(dataclasses.replace(TABLE, name="other"), "cpu", store) is None


def test_a_scale_the_table_does_not_have_is_named(tmp_path):
    with pytest.raises(TableError, match="table tiny has no scale 'paper'; it has cpu"):
        timing.time_table(TABLE, "paper", Store(tmp_path, "paper"))


def test_methods_without_a_model_stand_beside_the_arm_they_come_with(trained, tmp_path):
    beside = Arm("majority", TABLE.arms[0].changes, tuned_with="monarch", reference="majority")
    claims = (
        Claim("Monarch beats the majority", "us", "monarch", "majority"),
        Claim("Monarch beats the majority in accuracy", "us", "monarch", "majority", metric="accuracy"),
        Claim("Monarch is known by its F1", "us", "monarch", "majority", metric="f1"),
    )
    table, store = dataclasses.replace(TABLE, arms=(*TABLE.arms, beside), claims=claims), Store(tmp_path, "cpu")
    assert run_table(table, "cpu", store, tmp_path / "runs", 60) and len(trained) == 21  # no more than without it
    results = results_of(plan(table, "cpu", store), store)
    assert results.line("majority").figures("loss") == [1.2] * 3 and results.line("monarch").figures("f1") == []
    loss, accuracy = (results.verdict(claim) for claim in claims[:2])
    assert (
        loss.gain == pytest.approx(0.1 - 0.001) and loss.status == "not decided"
    )  # 1.001, 1.101 and 1.201 against 1.2
    assert accuracy.gain == pytest.approx(-0.4)  # the table's direction: less is better
    with pytest.raises(TableError, match="arm 'monarch': its runs have no held-out figure 'f1'"):
        results.verdict(claims[2])
    page = report.report([dataclasses.replace(table, claims=claims[:2])], tmp_path).read_text()
    row = next(line for line in page.splitlines() if line.startswith("| majority"))
    assert "1.2000" in row and row.count("| - ") + row.count("  - ") >= 7


def test_seeds_may_make_their_own_data(monkeypatch, tmp_path):
    base = dataclasses.replace(TINY, reseeded=("eval.batches",), rates=(1.0,))
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), base)
    runs = plan(dataclasses.replace(TABLE, claims=()), "cpu", Store(tmp_path, "cpu")).row("monarch").runs
    assert [(run.config.seed, run.config.eval.batches) for run in runs] == [(0, 0), (1, 1), (2, 2)]


def test_a_table_may_go_without_a_low_rank_row(monkeypatch):
    monkeypatch.setitem(bases.BASES, ("cpu", "tiny"), TINY)
    table = dataclasses.replace(TABLE, low_rank="", claims=())
    assert [arm.name for arm, _ in planning.arms_of(table, "cpu")][:3] == [DENSE, SMALL, "monarch"]


def test_data_made_from_the_config_is_not_made_to_name_a_run(monkeypatch):
    config = default("navier_stokes")
    made = validate(config).generated
    assert planning.data_hash(config) == made and "navier_stokes" in made
    assert planning.data_hash(small()) == validate(small()).load().sha256


def test_the_summary_has_a_line_per_table_and_replaces_the_old_one(trained, tmp_path):
    store = Store(tmp_path, "cpu")
    run_table(TABLE, "cpu", store, tmp_path / "runs", 60)
    found = report.with_results([TABLE], tmp_path)
    page = within(f"a\n{BEGIN}\nstale\n{END}\nb", found)
    assert page.startswith(f"a\n{BEGIN}\n| table ") and page.endswith(f"|\n{END}\nb") and "stale" not in page
    (line,) = [line for line in page.splitlines() if "[tiny]" in line]
    assert (
        "#tiny-cpu-a-tiny-table)" in line
        and "| loss, less is better | monarch | 1.101 | 1.101 | 1.101 | 1.601 | 2, 0, 0 |" in line
    )
    assert within(page, found) == page
    with pytest.raises(ValueError, match="has no <!-- tables: begin -->"):
        within("nothing", found)
