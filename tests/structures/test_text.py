"""The text form: what it reads, what it prints, and how it answers a mistake."""

import pytest

import structmat
from structmat import StructureError, parse
from structmat.structures import CONSTRUCTORS, FAMILIES, Fit, Frozen, Product, Scaled, Sum, Transpose
from structmat.structures.block_low_rank import BlockLowRank
from structmat.structures.dense import Dense
from structmat.structures.kronecker import Kronecker
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("dense", Dense()),
        ("low_rank(8)", LowRank(8)),
        ("low_rank(rank=8, init='paper')", LowRank(8, init="paper")),
        ("low_rank(8, train=['a'])", LowRank(8, train=("a",))),
        ("block_low_rank(4, 6, rank=2)", BlockLowRank(4, 6, 2)),
        ("  monarch( blocks = 4 ,\n order='blocked' ) ", Monarch(4, "blocked")),
        ("kronecker(in_factors=(2, 3))", Kronecker(in_factors=(2, 3))),
        ("low_rank(8) + dense()", Sum((LowRank(8), Dense()))),
        ("(low_rank(8) + dense()) + monarch(4)", Sum((LowRank(8), Dense(), Monarch(4)))),
        ("low_rank(8) + dense() @ monarch(4)", Sum((LowRank(8), Product(Dense(), Monarch(4))))),
        ("product(dense(), low_rank(2), inner=64)", Product(Dense(), LowRank(2), 64)),
        ("frozen(dense()) + scaled(low_rank(2), 0.5)", Sum((Frozen(Dense()), Scaled(LowRank(2), 0.5)))),
        ("scaled(dense, s=-2)", Scaled(Dense(), -2.0)),
        ("transpose(frozen(dense()))", Transpose(Frozen(Dense()))),
        ("fit(low_rank() + monarch(4), params=1)", Fit(Sum((LowRank(), Monarch(4))), params=1.0)),
        ("product(low_rank(1) + dense(), dense(), inner=3)", Product(Sum((LowRank(1), Dense())), Dense(), 3)),
    ],
)
def test_reads_and_prints_back(text, structure):
    assert parse(text) == structure and hash(parse(text)) == hash(structure)
    assert parse(str(structure)) == structure == parse(structure.short()) == eval_repr(structure)
    assert parse(structure) is structure


def eval_repr(structure):
    return parse(repr(structure))


def test_operators_build_what_text_does():
    a, b = LowRank(2), Monarch(4)
    assert a + b == parse("low_rank(2) + monarch(4)")
    assert a + b + a == parse("low_rank(2) + monarch(4) + low_rank(2)")
    assert a @ b == parse("low_rank(2) @ monarch(4)")
    assert str((a + b) @ a) == str(parse(str((a + b) @ a)))
    with pytest.raises(TypeError):
        a + 3


def test_prints_every_argument_in_declared_order():
    assert str(parse("low_rank(8)")) == "low_rank(rank=8, init='spectral', train=None)"
    assert str(parse("monarch(4)")) == "monarch(blocks=4, order='paper', init='spectral', train=None)"
    assert parse("monarch(4)").short() == "monarch(blocks=4)"
    assert str(parse("scaled(dense(), 2)")) == "scaled(dense(init='spectral', train=None), s=2.0)"
    assert parse("fit(low_rank(), params=0.25)").short() == "fit(low_rank(), params=0.25)"
    assert str(parse("kronecker()").bind(24, 36).structure).startswith("kronecker(terms=1, in_factors=(6, 4), out_fac")


def test_every_name_is_registered_under_its_own_name():
    assert all(cls.name == name for name, cls in CONSTRUCTORS.items())
    assert set(FAMILIES) <= set(CONSTRUCTORS)
    assert all(cls.__doc__.startswith(f"`{name}(") for name, cls in FAMILIES.items())


MALFORMED = [
    ("", "a structure must be text such as 'monarch(blocks=4)', got ''"),
    ("   ", "a structure must be text"),
    (None, "got None"),
    (5, "got 5"),
    ("low_rnk(rank=8)", "unknown structure 'low_rnk'; did you mean 'low_rank'? valid: dense, low_rank"),
    ("dense() + low_rnk(2)", "  dense() + low_rnk(2)\n            ^"),
    ("blocks", "unknown structure 'blocks'"),
    ("low_rank(rnk=8)", "low_rank has no argument 'rnk'; did you mean 'rank'? valid: rank, init, train"),
    ("low_rank(rank=8", "not a structure: '(' was never closed"),
    ("low_rank(rank=8) trailing", "  low_rank(rank=8) trailing\n                   ^"),
    ("dense; dense", "not a structure: invalid syntax"),
    ("frozen(dense) @", "not a structure: invalid syntax"),
    ("low_rank(rank='8')", "low_rank: rank must be an int or None, got '8'"),
    ("low_rank(rank=1e1)", "rank must be an int or None, got 10.0"),
    ("low_rank(rank=True)", "rank must be an int or None, got True"),
    ("low_rank(rank=low_rank(rank=2))", "rank must be an int or None, got low_rank(rank=2"),
    ("low_rank(rank=0)", "low_rank: rank must be at least 1, got 0"),
    ("low_rank(rank=-3)", "low_rank: rank must be at least 1, got -3"),
    ("low_rank(rank=-'a')", "not a number"),
    ("low_rank(rank=nan)", "unknown structure 'nan'"),
    ("low_rank(8, rank=8)", "low_rank: rank is given twice"),
    ("low_rank(8, 9)", "low_rank takes 1 positional arguments, got 2"),
    ("low_rank(8) - dense()", "expected a structure such as low_rank(rank=8), combined with +, @ or *"),
    ("2 @ dense()", "expected a structure"),
    ("dense() + 3", "  dense() + 3\n            ^"),
    ("monarch(blocks=4, order='papr')", "monarch: order got 'papr'; did you mean 'paper'? valid: blocked, paper"),
    ("dense(init='specral')", "dense: init got 'specral'; did you mean 'spectral'? valid: spectral, variance, paper"),
    ("dense(init=3)", "dense: init got 3; valid: spectral, variance, paper"),
    ("low_rank(rank=8, train='a')", "low_rank: train must be a tuple of strings or None, got 'a'"),
    ("low_rank(rank=8, train=('a', 3))", "train must be a tuple of strings or None, got ('a', 3)"),
    ("kronecker(in_factors=3)", "kronecker: in_factors must be a tuple of ints or None, got 3"),
    ("kronecker(in_factors=(1, 2, 3))", "kronecker: in_factors must be two positive ints, got (1, 2, 3)"),
    ("tensor_train(rank=2, cores=1)", "tensor_train: cores must be at least 2, got 1"),
    ("fit(low_rank())", "fit needs exactly one of params=, flops=, bits=, got none"),
    ("fit(low_rank(), params=0.2, bits=0.2)", "fit needs exactly one of params=, flops=, bits=, got params, bits"),
    ("fit(low_rank(), params=2)", "fit: params=2.0 must be a fraction of dense in (0, 1]"),
    ("fit(low_rank(), flops=0)", "fit: flops=0.0 must be a fraction of dense in (0, 1]"),
    ("scaled(dense(), s=0)", "scaled: s must not be 0"),
    ("scaled(dense(), s=1e999)", "scaled: s must be a float, got inf"),
    ("frozen(3)", "frozen: a must be a structure, got 3"),
    ("frozen()", "frozen needs a"),
    ("product(dense())", "product needs b"),
    ("product(dense(), dense(), inner=0)", "product: inner must be at least 1, got 0"),
    ("frozen(dense(), init='variance')", "frozen: set init on the parts, not on the whole"),
    ("dense(**{'init': 'paper'})", "dense: arguments are written out as name=value, ** is not read"),
    ("low_rank(*[8])", "expected a structure"),
    ("__import__('os').system('true')", "expected a structure"),
    ("dense.__class__", "expected a structure"),
    ("lambda: dense()", "expected a structure"),
    ("[dense()]", "expected a structure"),
    ("low_rank(rank=" + "9" * 5000 + ")", "not a structure"),
    ("dense()" + " + dense()" * 2000, "a structure of 20007 characters is too long; at most 10000"),
    ("+".join(["dense()"] * 1100), "nested more than 200 deep"),
    ("transpose(" * 199 + "dense()" + ")" * 199, "nested more than 200 deep"),
    ("low_rank(" + "-" * 5000 + "1)", "not a structure"),
    ("a\x00b", "not a structure"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=lambda v: str(v)[:30])
def test_malformed(text, message):
    with pytest.raises(StructureError) as error:
        parse(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 1200


def test_arguments_are_checked_in_python_too():
    with pytest.raises(StructureError, match=r"low_rank: rank must be an int or None, got 8\.0"):
        LowRank(8.0)
    with pytest.raises(StructureError, match="frozen: set train on the parts"):
        Frozen(Dense(), train=("kernel",))
    assert Scaled(Dense(), 2).s == 2.0 and isinstance(Scaled(Dense(), 2).s, float)


def test_structures_are_frozen_and_structmat_exports_them():
    with pytest.raises(AttributeError):
        LowRank(8).rank = 9
    assert isinstance(structmat.parse("low_rank(8)"), structmat.Structure)
