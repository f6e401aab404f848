"""`config.switch`: its text, and runs that pass through it, killed and resumed on every side of it."""

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from structmat.nn import site_params
from structmat.training import dry_run, loop
from structmat.training.checkpoint import Checkpointer
from structmat.training.config import default, identity, validate
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from structmat.training.metrics import read_metrics
from structmat.training.switch import stages, switches
from tests.training.small_runs import small_digits, small_lm, write_corpus
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401
from tests.training.test_step import Ball


def of(text, **fields):
    return small_digits(structure="monarch(blocks=4)", steps=100, switch=text, **fields)


def test_stages_are_read_with_their_rules():
    config = default("lm")
    config.model.layers = 1
    config.update(steps=200, structure="low_rank(rank=4)")
    config.switch = (
        "0.25: layers_.*/mlp/.* -> monarch(blocks=4); .*attn/q -> dense(); 0.9: dense()\n 190.0 : head -> dense() "
    )
    config.switch = config.switch.replace("head -> dense()", "head -> low_rank(rank=2)")
    assert [s.step for s in switches(config)] == [50, 180, 190]
    assert [len(s.rules.rules) for s in switches(config)] == [2, 1, 1]
    found = {
        begun: {p: s.bound.structure.name for p, s in t.table.items()} for begun, t in stages(config, validate(config))
    }
    assert list(found) == [0, 50, 180, 190]
    up, k, q, head = (
        [names[p] for names in found.values()]
        for p in ("layers_0/mlp/up", "layers_0/attn/k", "layers_0/attn/q", "head")
    )
    assert up == ["low_rank", "monarch", "dense", "dense"] and q == ["low_rank", "dense", "dense", "dense"]
    assert k == ["low_rank", "low_rank", "dense", "dense"] and head == ["dense", "dense", "dense", "low_rank"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dense()", "must read 'when: rules'; '0.9: dense()' is"),
        ("half: dense()", "must read 'when: rules'"),
        ("0.5: dens()", "did you mean 'dense'"),
        ("0.5: low_rank(rnk=2)", "did you mean 'rank'"),
        ("0.5:", "monarch"),
        ("0.5: layer_0 -> dense()", "matches no site; near: layers_0"),
        ("0.5: layers_( -> dense()", "not a regular expression"),
        ("0.5: monarch(blocks=7)", "site layers_0: monarch: blocks=7 does not fit"),
        ("0.5: fourier()", "fourier"),
        ("0.5: head -> dense()", "changes no site"),
        ("0.5: dense(); 0.9: dense()", "changes no site"),
        ("0.5: dense(); head", "dense(); head"),
        ("0.5: head -> dense(); head", "'head' must read 'regex -> structure'"),
        ("2.5: dense()", "2.5 must be a fraction below 1, whole steps or 'end'; 2 is"),
        ("101: dense()", "101 is step 101 of steps=100, and must be within it; 'end' is its last"),
        ("end: dense(); 100: low_rank(rank=2)", "100 is step 100, and must come after step 100"),
        ("edn: dense()", "must read 'when: rules'"),
        ("0.001: dense()", "0.001 is step 0 of steps=100"),
        ("0.9: dense(); 0.5: low_rank(rank=2)", "0.5 is step 50, and must come after step 90"),
        ("0.5: dense(); 50: low_rank(rank=2)", "50 is step 50, and must come after step 50"),
    ],
)
def test_what_is_wrong_is_told_at_once(text, hint):
    with pytest.raises(ConfigError) as caught:
        validate(of(text))
    assert caught.value.field == "switch" and repr(text) in str(caught.value) and hint in str(caught.value)


MASKED = "masked(dense(), unstructured(density=0.25), rule='plain')"


@pytest.mark.long
@pytest.mark.parametrize("method", ["rigl(every=3)", ""])
def test_a_switch_at_the_end_projects_what_was_trained(method, tmp_path, caplog):
    """Whatever trained it; killed before and after it a run ends with the same bits and figures."""
    own = MASKED if method else "dense()"
    config = small_digits(structure=own, method=method, switch="end: low_rank(rank=4)", steps=8)
    config.checkpoint.every, config.eval.batches = 4, 1
    record = loop.train(config, tmp_path / "whole")
    alone = small_digits(structure=own, method=method, steps=8)
    alone.eval.batches = 1
    trained = loop.train(alone, tmp_path / "alone")
    (row,) = record.metrics["switches"]
    assert row["step"] == 8 and row["heldout_before"] == trained.metrics["heldout"] != record.metrics["heldout"]
    assert (
        record.structures["layers_0"] == "low_rank(rank=4, init='spectral', train=None)"
        and record.metrics["step_seconds"] > 0
    )
    assert record.metrics["params"] == 4 * (64 + 16) + 16 + 170
    ours, dense = load_run(tmp_path / "whole"), load_run(tmp_path / "alone")
    w, a = (np.asarray(run.task.table["layers_0"].bound.materialize(_site(run))) for run in (dense, ours))
    u, s, vt = np.linalg.svd(w)
    np.testing.assert_allclose(a, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    assert row["worst_error"] == pytest.approx(np.linalg.norm(w - a) / np.linalg.norm(w), abs=1e-5)

    with pytest.raises(Killed):
        loop.train(config, tmp_path / "parts", on_step=kill_at(7))
    loop.train(config, tmp_path / "parts")
    (tmp_path / "parts" / "record.json").unlink()
    again = loop.train(config, tmp_path / "parts")
    assert array_sums(tmp_path / "parts") == array_sums(tmp_path / "whole")
    assert again.metrics["heldout"] == record.metrics["heldout"] and without_times(again) == without_times(record)


def _site(run):
    path = "layers_0"
    return site_params(run.variables, path, run.task.table[path])


def test_a_switch_is_part_of_what_a_run_is():
    assert identity(of("0.5: dense()"))["switch"] == "0.5: dense()" != identity(of(""))["switch"]
    assert switches(of("")) == []


def test_rules_and_switches_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.switch = '0.5: dense\(\)': cannot go with the rule Ball"):
        loop.train(of("0.5: dense()"), tmp_path / "run", rule=Ball())
    with pytest.raises(ConfigError, match="cannot go with the rule"):
        dry_run.dry_run(of("0.5: dense()"), Console(file=io.StringIO()), rule=Ball())
    assert not (tmp_path / "run").exists()


def killed_at(when, seen):
    kill = kill_at(when)
    return lambda step, row: (seen.append(step), kill(step, row))


def without_times(record):
    return [row | {"step_seconds": 0} for row in record.metrics["switches"]]


@pytest.mark.parametrize(
    ("more", "params", "kills"),
    [
        pytest.param("", 1210, (7,), id="at"),
        pytest.param("; 6: layers_0 -> low_rank(rank=3)", 426, (7, 11), id="at-before-after", marks=pytest.mark.long),
        pytest.param(
            "; 6: layers_0 -> low_rank(rank=3) + random_sparse(density=0.1)",
            522,
            (7, 11),
            id="drawn-support",
            marks=pytest.mark.long,
        ),
    ],
)
def test_killed_before_at_and_after_a_switch_a_run_ends_with_the_same_bits(more, params, kills, tmp_path, caplog):
    """Saved at the kill at step 7 is step 4, just before all switches; at step 11, step 8, after them."""
    config = small_digits(structure="monarch(blocks=4)", switch=f"0.34: dense(){more}")
    config.model.dropout = 0.1 if more else 0.0
    config.checkpoint.every = 4
    config.eval.batches = 1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with caplog.at_level("INFO"):
        expected = loop.train(config, whole)
    assert "step 4: 1 site switched, worst relative error 0 at layers_0, parameters 506 -> 1,210" in caplog.text
    seen = []
    for when in kills:
        with pytest.raises(Killed):
            loop.train(config, parts, on_step=killed_at(when, seen))
    record = loop.train(config, parts, on_step=killed_at(None, seen))
    assert _restarts(seen) == [{7: 5, 11: 9}[when] for when in kills]
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert record.metrics["heldout"] == expected.metrics["heldout"]

    rows = without_times(record)
    assert rows == without_times(expected) and [row["step"] for row in rows] == [4, 6][: len(rows)]
    assert rows[0]["worst_error"] == 0 and (rows[0]["params_before"], rows[-1]["params_after"]) == (506, params)
    assert record.structures["layers_0"] == rows[-1]["sites"]["layers_0"]["new"]
    assert record.metrics["params"] == params and record.metrics["step_seconds"] > 0
    assert all(np.isfinite(row["loss"]) for row in read_metrics(parts) if "loss" in row)
    with Checkpointer(str(parts)) as saved:
        extra = saved.latest().extra
    assert extra["sites"]["layers_0"]["structure"] == record.structures["layers_0"]
    assert extra["switches"] == record.metrics["switches"]
    if more:
        assert str(load_run(parts).task.table["layers_0"].bound.structure) == record.structures["layers_0"]
        assert rows[1]["params_before"] == 1210
        assert 0 < rows[1]["worst_error"] == rows[1]["sites"]["layers_0"]["error"] < 1


def _restarts(seen):
    """The first step after every kill."""
    return [step for before, step in itertools.pairwise(seen) if step <= before]


def test_the_dry_run_prints_every_stage(monkeypatch):
    monkeypatch.setattr(dry_run, "compile_step", lambda task, step, template, mesh: NoMemory())
    out = io.StringIO()
    dry_run.dry_run(of("0.9: dense()"), Console(file=out, width=200))
    first, second = out.getvalue().split("from step 91 of 100")
    assert "from step 1 of 100" in first and "monarch(blocks=4)" in first and "monarch" not in second
    assert "3.20x" in first and "1,210" in second


class NoMemory:
    def memory_analysis(self):
        return None


@pytest.mark.long
def test_scanned_layers_on_a_mesh_switch_in_part_and_resume(tmp_path):
    """A group of two layers comes apart; what belongs to unchanged leaves passes with its bits."""
    config = small_lm(write_corpus(tmp_path / "corpus"), structure="monarch(blocks=2)")
    config.switch = "6: layers_1/mlp/.* -> dense(); layers_0/attn/. -> low_rank(rank=2)"
    config.model.layers = 2
    config.mesh.update(data=2, fsdp=2, tensor=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record = loop.train(config, whole)
    with pytest.raises(Killed):
        loop.train(config, parts, on_step=kill_at(9))
    loop.train(config, parts)
    assert array_sums(parts) == array_sums(whole)
    (row,) = record.metrics["switches"]
    errors = {path: site["error"] for path, site in row["sites"].items()}
    assert len(errors) == 6 and max(errors["layers_1/mlp/up"], errors["layers_1/mlp/down"]) < 1e-5
    assert row["worst_error"] == max(errors.values()) == max(errors[f"layers_0/attn/{name}"] for name in "kvo") > 0.1
    losses = [row["loss"] for row in read_metrics(whole) if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0]
