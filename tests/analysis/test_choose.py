"""`choose`: every candidate at equal budget on every weight, streamed, ranked, told, turned into rules."""

import functools
import gc
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import Rules, Structure, StructureError, choose, parse
from structmat.analysis.choices import ROUNDING, Choices
from structmat.analysis.choose import SUMS, candidates
from structmat.structures import FAMILIES, random

RNG = np.random.default_rng(0)
TRIED = ["low_rank()", "spectral()", "kronecker()", "random_sparse(select='magnitude')", "monarch()"]
WEIGHTS = {
    "layers_0/mlp/up": RNG.normal(size=(16, 24)).astype(np.float32),
    "layers_1/mlp/up": np.asarray(random("kronecker(terms=2)", 16, 24, jax.random.key(0)).materialize()),
}
KRON = "layers_1/mlp/up"


@pytest.fixture(scope="module")
def found():
    return choose(WEIGHTS, (0.5, 0.25), structures=TRIED)


def test_every_weight_candidate_and_budget_has_a_row(found):
    assert len(found.rows) == len(WEIGHTS) * len(TRIED) * 2
    assert found.budgets == (0.25, 0.5) and found.paths == tuple(WEIGHTS)
    for row in found.rows:
        if row.reason:
            assert row.structure == "" and row.error is None
            continue
        bound = parse(row.structure).bind(16, 24)
        assert bound == parse(f"fit({row.candidate}, bits={row.budget})").bind(16, 24), "the largest member"
        assert row.bits == bound.cost(1).bits / (32 * 16 * 24) <= row.budget
        assert row.params == bound.params / (16 * 24) and row.flops == bound.cost(1).flops / (2 * 16 * 24)
        matrix = structmat.project(WEIGHTS[row.path], row.structure)
        assert row.error == pytest.approx(float(matrix.error(WEIGHTS[row.path])), rel=1e-4, abs=ROUNDING)
        assert row.optimal and row.gram == "" and row.seconds > 0


def test_a_member_is_found_and_ties_go_to_what_costs_less(found):
    best = found.best(KRON, 0.5)
    assert best.candidate == "kronecker()" and best.error < ROUNDING
    ranked = found.ranked("layers_0/mlp/up", 0.25)
    assert [r.error for r in ranked if not r.reason] == sorted(r.error for r in ranked if not r.reason)
    tie = choose(WEIGHTS[KRON], 1.0, structures=["kronecker(terms=9)", "kronecker(terms=2)", "low_rank(rank=9)"])
    assert tie.best().short.startswith("kronecker(terms=2")


def test_what_does_not_fit_is_told(found):
    refused = [r for r in found.rows if r.reason]
    assert {r.candidate for r in refused} == {"monarch()"}
    assert "smallest member monarch(blocks=4) needs 0.4167" in found.ranked(KRON, 0.25)[-1].reason
    text = repr(found)
    assert "does not fit:\n  monarch(): fit: bits=0.25" in text and "(and 1 more)" in text
    fixed = choose(WEIGHTS, 0.25, structures=["low_rank(rank=1)", "low_rank(rank=8)", "dense()"])
    assert "low_rank(rank=8) needs 0.8333 of dense bits, the budget is 0.25" in fixed.ranked(KRON)[-2].reason
    with pytest.raises(StructureError, match=r"no candidate fits 'layers_1/mlp/up' at budget 0.01; "):
        choose(WEIGHTS, 0.01, structures=["monarch()"]).best(KRON)


def test_standings_are_geometric_means_and_wins(found):
    standings = found.standings(0.5)
    first = next(s for s in standings if s.candidate == "low_rank()")
    errors = [r.error for r in found.rows if (r.candidate, r.budget) == ("low_rank()", 0.5)]
    assert first.error == pytest.approx(math.sqrt(errors[0] * errors[1])) and (first.fits, first.weights) == (2, 2)
    assert sum(s.wins for s in standings) == len(WEIGHTS)
    assert [s.error for s in standings] == sorted(s.error for s in standings)
    assert found.standings(0.25)[-1].candidate == "monarch()" and found.standings(0.25)[-1].fits == 0


def test_shares_are_weighted_by_size():
    weights = {"a": RNG.normal(size=(8, 8)).astype(np.float32), "b": RNG.normal(size=(8, 24)).astype(np.float32)}
    standing = choose(weights, 1.0, structures=["low_rank(rank=2)"]).standings()[0]
    assert standing.bits == pytest.approx((2 * 16 + 2 * 32) / (64 + 192))


def test_reads_one_weight_at_a_time():
    shape, refs, alive_at_read, on_device = (17, 66), [], [], []
    whole = lambda: sum(a.shape == shape for a in jax.live_arrays())

    def read(seed):
        gc.collect()
        alive_at_read.append(sum(ref() is not None for ref in refs) + whole())
        w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        refs.append(weakref.ref(w))
        return w

    sources = {str(i): functools.partial(read, i) for i in range(4)}
    watch = lambda choice: on_device.append(whole())
    found = choose(sources, 0.3, structures=["low_rank()", "monarch(blocks=3)", "dense()"], progress=watch)
    assert alive_at_read == [0, 0, 0, 0], "each is read once, when the one before is gone"
    assert set(on_device) == {1}, "a projection leaves nothing of the weight's size behind"
    assert len(found.rows) == 12


def test_rules_assign_each_weight_its_best(found):
    text = found.rules(0.5)
    chosen = Rules.of(text).resolve(dict.fromkeys(WEIGHTS, "linear"))
    for path in WEIGHTS:
        assert str(chosen[path]) == found.best(path, 0.5).structure
    assert found.rules(0.5, "low_rank()") == "layers_0/mlp/up|layers_1/mlp/up -> low_rank(rank=4)"
    odd = {"a.b -> c; |d*\n": WEIGHTS[KRON], "ab": WEIGHTS[KRON]}
    rules = choose(odd, 0.5, structures=["low_rank()"]).rules()
    assert "dense" not in str(Rules.of(rules).resolve(dict.fromkeys(odd, "linear")).values())
    with pytest.raises(StructureError, match="candidate 'diagonal\\(\\)' was not tried; "):
        found.rules(0.5, "diagonal()")
    with pytest.raises(StructureError, match=r"monarch\(\) fits no weight at budget 0.25"):
        found.rules(0.25, "monarch()")


def test_json_round_trip_and_repr(found):
    assert Choices.from_json(found.to_json()) == found
    assert repr(found).startswith("Choices(2 weights, budget 0.25, 0.5 of dense bits)")
    one = choose(WEIGHTS[KRON], 0.5, metric="params", structures=["low_rank()", "kronecker()"])
    text = repr(one)
    assert text.startswith("Choices(weight (16, 24), budget 0.5 of dense params)") and "1   kronecker(terms=" in text
    assert "optimal" in text and one.best().path == "weight"


def test_plot_holds_the_errors(found):
    axes = found.plot().axes[0]
    drawn = {line.get_label(): [*zip(line.get_xdata(), line.get_ydata())] for line in axes.lines}
    assert drawn["low_rank()"] == [
        (s.bits, s.error) for b in found.budgets for s in found.standings(b) if s.candidate == "low_rank()"
    ]
    alone = found.plot(KRON).axes[0].lines
    row = found.ranked(KRON, 0.25)
    assert {line.get_label(): line.get_ydata()[0] for line in alone}["spectral()"] == next(
        r.error for r in row if r.candidate == "spectral()"
    )
    assert "geometric mean of 2 weights" in axes.get_ylabel() and axes.get_xlabel() == "bits, fraction of dense"


def test_grams_weigh_the_errors():
    w = WEIGHTS["layers_0/mlp/up"]
    x = RNG.normal(size=(200, 16)) * np.linspace(0.1, 3, 16)
    full = (x.T @ x / 200).astype(np.float32)
    tried = ["low_rank()", "random_sparse(select='magnitude')", "kronecker()"]
    rows = {r.candidate: r for r in choose({"w": w}, 0.5, structures=tried, in_grams={"w": full}).rows}
    assert [rows[t].gram for t in tried] == ["full", "diagonal", "none"]
    assert [rows[t].optimal for t in tried] == [True, False, False]
    root = np.linalg.cholesky(full).T
    for text, gram in zip(tried, (full, np.diag(full), None)):
        matrix = structmat.project(w, rows[text].structure, in_gram=gram if gram is None else jnp.asarray(gram))
        wanted = np.linalg.norm(root @ (w - np.asarray(matrix.materialize()))) / np.linalg.norm(root @ w)
        assert rows[text].error == pytest.approx(wanted, rel=1e-4)
    plain = structmat.project(w, rows["low_rank()"].structure)
    assert rows["low_rank()"].error < np.linalg.norm(root @ (w - np.asarray(plain.materialize()))) / np.linalg.norm(
        root @ w
    )
    diagonal = choose(w, 0.5, structures=tried, in_grams=lambda: np.diag(full))
    assert [r.gram for r in diagonal.rows] == ["diagonal", "diagonal", "none"] and diagonal.rows[1].optimal
    rest = np.sqrt(np.diag(full))[:, None] * (w - structmat.project(w, diagonal.rows[2].structure).materialize())
    assert diagonal.rows[2].error == pytest.approx(
        np.linalg.norm(rest) / np.linalg.norm(np.sqrt(np.diag(full)) * w.T), rel=1e-4
    )
    assert "diagonal/" not in repr(diagonal) and "gram" in repr(diagonal)


def test_the_key_decides_what_is_random():
    pick = lambda key, paths=("a", "b"): [
        r.error for r in choose({p: WEIGHTS[KRON] for p in paths}, 0.5, structures=["random_sparse()"], key=key).rows
    ]
    assert pick(None) == pick(jax.random.key(0)) != pick(jax.random.key(1))
    assert len(set(pick(None))) == 2 and pick(None, ("b",)) == pick(None)[1:], "each path draws its own, in any company"


def test_default_candidates_come_from_the_registry():
    texts = [c.short() for c in candidates()]
    names = {c.name for c in candidates()}
    assert {"low_rank()", "monarch()", "random_sparse(select='magnitude')", "channel_sparse(select='norm')"} <= set(
        texts
    )
    assert {"block_low_rank", "n_m_sparse"} <= names, "families that need an argument are tried with one"
    assert len(texts) == len(set(texts)) and names & {"dense", "diagonal", "dct"} == set(), (
        "nothing is left to choose there"
    )
    assert {parse(t).short() for t in SUMS} <= set(texts)
    assert {n for n, family in FAMILIES.items() if family.candidates is not Structure.candidates} <= names


def test_progress_tells_every_row_as_it_comes():
    told = []
    found = choose(WEIGHTS, 0.5, structures=["low_rank()"], progress=told.append)
    assert tuple(told) == found.rows


def test_half_precision_and_integers_are_read_as_floats():
    w = WEIGHTS[KRON]
    half = choose(jnp.asarray(w, jnp.bfloat16), 0.5, structures=["low_rank()"]).best()
    assert half.error == pytest.approx(choose(w, 0.5, structures=["low_rank()"]).best().error, rel=0.02)
    assert choose(np.arange(64).reshape(8, 8), 0.5, structures=["low_rank()"]).best().error < 1e-5


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda w: choose(w, 0), "budget 0 must be a fraction of dense"),
        (lambda w: choose(w, (0.1, 1.5)), "budget 1.5 must be a fraction of dense"),
        (lambda w: choose(w, ()), "no budget was given"),
        (lambda w: choose(w, 0.5, metric="bit"), "metric 'bit'; did you mean 'bits'"),
        (lambda w: choose({}, 0.5), "no weights were given"),
        (lambda w: choose(w, 0.5, structures=[]), "no structures were given"),
        (lambda w: choose({"a/b": w[0]}, 0.5), r"weight 'a/b' has shape \(24,\); give one matrix"),
        (lambda w: choose({"a": w * 0}, 0.5), "weight 'a' is zero; leave it out"),
        (lambda w: choose({"a": w * np.nan}, 0.5), "weight 'a' has entries that are not finite"),
        (lambda w: choose({"a": w + 1j}, 0.5), "weight 'a' is complex64"),
        (lambda w: choose({"a": w}, 0.5, in_grams={"b": np.ones(16)}), "only on one side: a, b"),
        (lambda w: choose({"a": w}, 0.5, in_grams={"a": np.ones(24)}), r"the gram of 'a' has shape \(24,\)"),
        (lambda w: choose(w, 0.5, structures=["low_rnk()"]), "low_rnk"),
        (lambda w: choose(WEIGHTS, 0.5, structures=["low_rank()"]).best(), "which weight\\? got None"),
        (lambda w: choose(w, (0.3, 0.5), structures=["low_rank()"]).best(), "which budget\\? got None; valid: 0.3, 0.5"),
    ],
)  # fmt: skip
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act(WEIGHTS["layers_0/mlp/up"])


def test_structmat_names_it_but_does_not_load_it():
    assert "choose" in dir(structmat) and structmat.choose is choose
    with pytest.raises(AttributeError, match="no attribute 'chose'"):
        structmat.chose  # noqa: B018
