"""Methods by name: reading, refusing, identity, and runs that are killed and loaded."""

import io

import numpy as np
import pytest
from rich.console import Console

from structmat.structures import FAMILIES
from structmat.training import dry_run, loop
from structmat.training.config import differences, identity, validate
from structmat.training.errors import ConfigError, RunError
from structmat.training.load import load_run
from structmat.training.methods import METHODS, method_of, rule_for
from structmat.training.record import Record
from structmat.training.rule import wanted_sites
from tests.marks import mostly_long
from tests.training.small_runs import small_digits
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401  a fixture
from tests.training.test_step import Ball

MASKED = "masked(dense(), unstructured(density=0.25), rule='plain')"


@pytest.mark.parametrize("name", METHODS)
def test_text_says_every_argument_and_reads_back(name):
    method = METHODS[name]()
    said = [f"{f.name}={getattr(method, f.name)!r}" for f in METHODS[name].text_fields()]
    assert str(method) == f"{name}({', '.join(said)})"
    assert method_of(small_digits(method=str(method))) == method == method_of(small_digits(method=f" {name}( )"))
    assert method_of(small_digits()) is None and not set(METHODS) & set(FAMILIES)


def test_arguments_are_read_whatever_their_spelling():
    found = method_of(small_digits(method=" rigl( every = 7 ,drop=1)"))
    assert str(found) == "rigl(every=7, drop=1.0, until=0.8)"
    assert found == method_of(small_digits(method=str(found))) != method_of(small_digits(method="rigl"))


@pytest.mark.parametrize(
    ("method", "structure", "message"),
    [
        ("rigll(every=3)", MASKED, "unknown method 'rigll'; did you mean 'rigl'"),
        ("rigl(evry=3)", MASKED, r"has no argument 'evry'; did you mean 'every'\?"),
        ("rigl(every=3) + set()", MASKED, "expected a method such as rigl"),
        ("rigl(every=3", MASKED, "not a method: "),
        ("rigl(every=set())", MASKED, "every must be an int, got set"),
        ("__import__('os').system('x')", MASKED, "expected a method such as"),
        ("rigl(every=2.5)", MASKED, "every must be an int, got 2.5"),
        ("set(every=0)", MASKED, "every must be at least 1, got 0"),
        ("set(drop=0.0)", MASKED, r"drop must be in \(0, 1\], got 0.0"),
        ("set(until=1.1)", MASKED, r"until must be in \(0, 1\], got 1.1"),
        (
            "rigl()",
            MASKED,
            "every=100 with until=0.8 of 12 steps never moves .* must be below until .* = 10, such as 1",
        ),
        ("rigl(every=2)", "low_rank(rank=2)", r"has none; its structures: dense\(\), low_rank\(rank=2\)"),
        ("rigl(every=2)", "masked(dense(), n_m_sparse(2, 4), rule='plain')", 'such as structure="masked.* has none'),
        ("rigl(every=2)", "masked(dense(), unstructured(density=0.25))", "site layers_0 .* rule='plain' stops them"),
        ("rigl(every=2)", MASKED.replace("dense()", "frozen(dense())"), "has none"),
    ],
)
def test_refused_before_anything_is_read(method, structure, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(small_digits(method=method, structure=structure))
    assert str(caught.value).startswith("config.method = ") and method in str(caught.value)


def test_the_method_is_part_of_the_identity_whatever_its_spelling():
    plain, short = small_digits(structure=MASKED), small_digits(structure=MASKED, method="rigl(3)")
    spelt = small_digits(structure=MASKED, method="rigl(every=3, drop=0.3, until=0.8)")
    assert identity(short) == identity(spelt)
    text = "rigl(every=3, drop=0.3, until=0.8)"
    assert list(differences(identity(plain), identity(short))) == [("method", "", text)]


def test_one_rule_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compile_step", None)
    config = small_digits(structure=MASKED, method="set(every=3)")
    with pytest.raises(ConfigError, match=r"the rule Ball\(.*\) was given too; one of the two is enough"):
        loop.train(config, tmp_path / "run", rule=Ball())
    assert not (tmp_path / "run").exists()
    table = validate(config).table
    assert rule_for(small_digits(), table, Ball()) == Ball() and rule_for(small_digits(), table) is None


def test_only_the_gradients_that_are_read_are_computed():
    for method, wanted in (("rigl(every=3)", {"layers_0"}), ("set(every=3)", set())):
        config = small_digits(structure=MASKED, method=method)
        table = validate(config).table
        assert set(wanted_sites(rule_for(config, table), table)) == wanted < set(table)
    assert wanted_sites(Ball(), table) == table and not wanted_sites(Ball(needs_dense_gradients=False), table)


@pytest.mark.parametrize("method", mostly_long(["rigl(every=3)", "set(every=3)"], []))
def test_a_killed_run_has_the_masks_of_an_uninterrupted_one(method, tmp_path):
    config = small_digits(structure=MASKED, method=method)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record = loop.train(config, whole)
    with pytest.raises(Killed):
        loop.train(config, parts, on_step=kill_at(7))
    loop.train(config, parts)
    sums = array_sums(whole)
    assert array_sums(parts) == sums and "frozen/layers_0/mask" in sums
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    run = load_run(parts)
    mask = np.asarray(run.variables["frozen"]["layers_0"]["mask"])
    w = np.asarray(run.variables["params"]["layers_0"]["weights"]["kernel"])
    assert mask.dtype == bool and mask.sum() == 256 and np.all(w[~mask] == 0) and run.config.method == method
    assert (
        record.metrics["method"]
        == f"{method[:-1]}, drop=0.3, until=0.8)"
        == Record.read(whole / "record.json").metrics["method"]
    )
    assert record.metrics["params"] == 64 * 16 + 16 + 16 * 10 + 10  # masks are no parameters
    with pytest.raises(RunError, match=r"method: there 'rigl\(.*now ''|method: there 'set\(.*now ''"):
        loop.train(small_digits(structure=MASKED), parts)


@pytest.mark.long
def test_dry_run_names_the_method():
    shown = io.StringIO()
    dry_run.dry_run(small_digits(structure=MASKED, method="set(every=3)"), Console(file=shown, width=200))
    assert "method: set(every=3, drop=0.3, until=0.8)" in shown.getvalue() and "mask(" in shown.getvalue()
