"""`fit`: the largest member within a fraction of dense, alone and in sums."""

import pytest

from structmat import StructureError, parse

SIZES = (48, 96)


def cost(structure, metric, sizes=SIZES):
    return getattr(parse(structure).bind(*sizes).cost(1), metric)


def one_larger(structure):
    """The next member of the resolved family."""
    free = {"block_diagonal": "blocks", "monarch": "blocks", "kronecker": "terms"}.get(structure.name, "rank")
    text = structure.short()
    recipe = parse(text.replace(f"{free}={getattr(structure, free)!r}", f"{free}=None"))
    members = recipe.candidates((SIZES[0],), (SIZES[1],))
    at = [m.bind(*SIZES) for m in members].index(structure.bind(*SIZES))
    return members[at + 1] if at + 1 < len(members) else None


@pytest.mark.parametrize("metric", ["params", "flops", "bits"])
@pytest.mark.parametrize(
    "recipe",
    [
        "low_rank()",
        "spectral()",
        "block_diagonal()",
        "block_low_rank(in_blocks=4, out_blocks=2)",
        "monarch()",
        "kronecker()",
        "kronecker(in_factors=(2, 24))",
        "tensor_train()",
        "tensor_train(cores=3)",
    ],
)
def test_takes_the_largest_member(recipe, metric):
    budget = 0.5
    found = parse(f"fit({recipe}, {metric}={budget})").bind(*SIZES)
    assert cost(found.structure, metric) <= budget * cost("dense()", metric)
    above = one_larger(found.structure)
    assert above is None or cost(above, metric) > budget * cost("dense()", metric)
    assert parse(str(found.structure)).bind(*SIZES) == found, "resolved text names the same matrix"


def test_an_exact_budget_is_taken_whole():
    share = cost("low_rank(rank=7)", "params") / cost("dense()", "params")
    assert parse(f"fit(low_rank(), params={share!r})").bind(*SIZES).structure == parse("low_rank(rank=7)")


@pytest.mark.parametrize("wrap", ["frozen({})", "scaled({}, s=2.0)", "transpose({})"])
def test_reaches_through_wrappers(wrap):
    found = parse(f"fit({wrap.format('low_rank()')}, params=0.3)").bind(*SIZES)
    assert str(found.structure) == str(parse(wrap.format("low_rank(rank=9)")))


def test_sums_pay_given_terms_first_and_split_the_rest():
    found = parse("fit(low_rank() + monarch(blocks=4) + kronecker(), params=0.6)").bind(*SIZES)
    low, monarch, kron = found.terms
    assert monarch.structure == parse("monarch(blocks=4)")
    total = 0.6 * cost("dense()", "params")
    left = total - monarch.params
    assert low.params <= left / 2 < cost(f"low_rank(rank={low.structure.rank + 1})", "params")
    assert kron.params <= left - low.params < kron.params + kron.params // kron.structure.terms
    assert found.params <= total


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fit(dense(), params=0.5)", "fit: dense() leaves nothing to choose for a weight of shape (48,) -> (96,); leave an argument such as rank"),
        ("fit(low_rank(rank=4), params=0.5)", "fit: low_rank(rank=4) leaves nothing to choose"),
        ("fit(kronecker(terms=1), params=0.5)", "leaves nothing to choose"),
        ("fit(low_rank(), params=0.02)", "fit: params=0.02 leaves 0.0200 of dense for low_rank(), whose smallest member low_rank(rank=1) needs 0.0312"),
        ("fit(monarch(blocks=2) + low_rank(), params=0.5)", "leaves 0.0000 of dense for low_rank()"),
    ],
)  # fmt: skip
def test_refusals(text, message):
    with pytest.raises(StructureError) as error:
        parse(text).bind(*SIZES)
    assert message in str(error.value)


def test_sizes_decide():
    """The same text chooses anew at every site."""
    text = parse("fit(low_rank(), params=0.25)")
    assert [text.bind(n, n).structure.rank for n in (16, 64, 256)] == [2, 8, 32]
