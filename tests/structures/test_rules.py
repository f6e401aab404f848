"""Rules: which site gets which structure."""

import pytest

from structmat import Rules, StructureError, parse

SITES = {f"layers_{i}/{part}": "linear" for i in range(12) for part in ("attention/query", "mlp/up", "mlp/down")} | {
    "embed": "embed",
    "head": "head",
}


def short(spec, sites=SITES):
    return {path: s.short() for path, s in Rules.of(spec).resolve(sites).items() if s.name != "dense"}


@pytest.mark.parametrize("spec", ["low_rank(rank=2)", parse("low_rank(rank=2)"), Rules.of("low_rank(rank=2)")])
def test_a_bare_structure_takes_linear_sites_only(spec):
    chosen = Rules.of(spec).resolve(SITES)
    assert list(chosen) == list(SITES)
    assert {p for p, s in chosen.items() if s.name == "low_rank"} == {
        p for p, kind in SITES.items() if kind == "linear"
    }


@pytest.mark.parametrize(
    "spec",
    [
        "layers_7/.* -> monarch(blocks=2); .*/mlp/.* -> low_rank(rank=2)",
        "layers_7/.* -> monarch(blocks=2)\n.*/mlp/.* -> low_rank(rank=2);\n",
        [("layers_7/.*", "monarch(blocks=2)"), (".*/mlp/.*", parse("low_rank(rank=2)"))],
    ],
)
def test_the_first_full_match_wins(spec):
    chosen = short(spec)
    assert chosen["layers_7/mlp/up"] == chosen["layers_7/attention/query"] == "monarch(blocks=2)"
    assert chosen["layers_8/mlp/up"] == "low_rank(rank=2)"
    assert "layers_8/attention/query" not in chosen and "embed" not in chosen
    assert Rules.of(str(Rules.of(spec))) == Rules.of(spec)


def test_the_whole_path_must_match():
    assert set(short("layers_1/mlp/up -> low_rank(rank=2)")) == {"layers_1/mlp/up"}
    assert set(short("head|embed -> low_rank(rank=2)")) == {"head", "embed"}


def test_no_rules_leave_everything_dense():
    assert short([]) == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mlp -> low_rank(rank=2)", "rule 'mlp' matches no site; near: "),
        ("layers_1/mlp -> low_rank(rank=2)", "(the whole path must match, try '.*')"),
        ("layers_1/mlp/upp -> low_rank(rank=2)", "near: layers_1/mlp/up, "),
        (".*/mlp/.* -> dense(); layers_3/mlp/.* -> dense()", "rule 'layers_3/mlp/.*' matches only sites that earlier rules took: layers_3/mlp/up, layers_3/mlp/down"),
        ("(mlp -> low_rank(rank=2)", "rule '(mlp' is not a regular expression"),
        (".*mlp.* -> low_rnk(2)", "unknown structure 'low_rnk'; did you mean 'low_rank'"),
        (".*mlp.* -> dense(); dense()", "rule 'dense()' must read 'regex -> structure'"),
    ],
)  # fmt: skip
def test_refusals(spec, message):
    with pytest.raises(StructureError) as error:
        Rules.of(spec).resolve(SITES)
    assert message in str(error.value)


def test_a_model_without_linear_sites():
    with pytest.raises(
        StructureError,
        match=r"low_rank\(rank=2\) applies to sites of kind 'linear', and the model has none; sites: head",
    ):
        Rules.of("low_rank(rank=2)").resolve({"head": "head"})
