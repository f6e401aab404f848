"""Torture figures: the registry, what is kept and counted, and short forms of the figures; longer ones under `torture`."""

import dataclasses
import random

import jax
import pytest

from experiments.torture import r1_kill, r3_sigterm, r5_damage, r6_configs, r7_meshes, r8_reruns, r9_meshes, r11_nan
from experiments.torture.figures import Figure, Row, Trial, load_all
from experiments.torture.measure import measure
from experiments.torture.report import report
from experiments.torture.runs import Tiny
from structmat.parallel import unbox
from structmat.training.config import validate
from structmat.training.state import abstract_variables
from structmat.training.step import leaf_paths


def trial_of(key, folder):
    return Trial(load_all()[key], 0, folder)


def assert_held(trial):
    assert all(row.tried and not row.failures for row in trial.rows), [row.failures for row in trial.rows]


def test_every_file_of_a_figure_is_found():
    keys = list(load_all())
    assert {"R1", "R3", "R5", "R6", "R7", "R8", "R9", "R11"} <= {key.split()[0] for key in keys}
    assert keys.index("R3 single") < keys.index("R11")


def test_a_row_holds_when_enough_was_tried_and_enough_held():
    row = Row("R0", "title", least=4, share=0.75)
    for ok in (True, True, False):
        row.check("case", ok, "why")
    assert not row.ok
    row.check("case", True)
    assert row.ok and (row.held, row.tried, row.failures) == (3, 4, ["case: why"])
    row.check("case", False)
    assert not row.ok


def test_finished_figures_are_kept_and_failures_are_told(tmp_path, capsys):
    calls = []

    def good(trial):
        calls.append("good")
        trial.check(f"a draw {trial.random.random()}", True)

    def bad(trial):
        calls.append("bad")
        trial.check("first", True)
        raise OSError("no luck")

    figures = {key: Figure(key, f"title of {key}", 1, run) for key, run in (("R1 a", good), ("R2", bad))}
    out = tmp_path / "sub" / "cpu.json"
    measure(figures, ["R1 a"], 0, out)
    record = measure(figures, list(figures), 0, out)
    assert calls == ["good", "bad"] and "R1 a: kept from" in capsys.readouterr().out
    assert list(record.metrics["figures"]) == ["R1 a", "R2"]
    assert report(record, out) == 1
    page = out.with_suffix(".md").read_text()
    assert "1/2 DOES NOT HOLD" in page and "- R2 the figure itself: OSError: no luck" in page
    measure(figures, ["R1 a"], 1, out)
    assert calls[2:] == ["good"]
    record = measure(figures, ["R1 a"], 1, out, fresh=True)
    assert calls[3:] == ["good"] and list(record.metrics["figures"]) == ["R1 a", "R2"]


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_told_and_the_older_step_stays(tmp_path):
    states = r5_damage.three_saves(tmp_path)
    assert r5_damage.full_disk(tmp_path, states, 64) == ""


def test_damage_that_is_loaded_would_be_seen(tmp_path):
    """The figure's own judgement: intact or replaced checkpoints called damaged, and reasons without the file."""
    states = r5_damage.three_saves(tmp_path)
    assert r5_damage.outcome(tmp_path, states, {}) == ""
    assert "instead of 20" in r5_damage.outcome(tmp_path, states, {30: ["x"]})
    assert "which is damaged" in r5_damage.outcome(tmp_path, states, {step: ["x"] for step in states})
    wrong = states | {30: states[20]}
    assert "other bits" in r5_damage.outcome(tmp_path, wrong, {})
    (tmp_path / "checkpoints" / "30" / "_CHECKPOINT_METADATA").unlink()
    assert "names none of ['x']" in r5_damage.outcome(tmp_path, states, {30: ["x"]})


@pytest.mark.long
def test_bad_configs_are_refused(tmp_path):
    trial = trial_of("R6", tmp_path)
    r6_configs.configs(trial, limit=12, commands=0)
    refused, typos, _ = trial.rows
    assert refused.tried >= 24 and not refused.failures, refused.failures
    assert typos.ok, typos.failures


def test_a_good_config_counts_as_accepted():
    good = next(r6_configs.bad_configs("digits", "mlp", random.Random(0)))
    fine = dataclasses.replace(good, config=Tiny().config())
    assert r6_configs.fault(fine) == "accepted"


@pytest.mark.long
def test_reruns_are_equal_and_other_seeds_are_not():
    first, again, other = (r8_reruns.digest_of(Tiny(steps=3, width=16, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.long
def test_nan_in_one_gradient_stops_the_run_by_its_name(tmp_path):
    paths = leaf_paths(unbox(abstract_variables(validate(r11_nan.TINY.config(), jax.device_count())))["params"])
    assert r11_nan.stopping(tmp_path / "run", random.Random(3), "gradient", paths) == ""


@pytest.mark.torture
def test_killed_runs_end_with_the_same_bits(tmp_path):
    trial = trial_of("R1 rule", tmp_path)
    r1_kill.many(trial, [r1_kill.long("masked(dense(), n_m_sparse(n=2, m=4))", 3, rule=True)], 3)
    assert_held(trial)


@pytest.mark.torture
def test_terminated_runs_end_in_order(tmp_path):
    trial = trial_of("R3 single", tmp_path)
    r3_sigterm.sigterm(trial, moments=3)
    assert_held(trial)


@pytest.mark.torture
def test_meshes_reruns_and_commands_in_other_processes(tmp_path):
    for key, run, options in (
        ("R6", r6_configs.configs, dict(limit=1, commands=3)),
        ("R7", r7_meshes.meshes, dict(counts=range(6, 8))),
        ("R8", r8_reruns.reruns, dict(structures=["low_rank(rank=2)"], times=2)),
        ("R9", r9_meshes.independence, dict(structures=["low_rank(rank=8)"], layouts=[(4, 1, 2)])),
        ("R11", r11_nan.nan, dict(each=1, stops=1)),
    ):
        (tmp_path / key).mkdir()
        trial = trial_of(key, tmp_path / key)
        run(trial, **options)
        assert_held(trial)
