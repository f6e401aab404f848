"""The scaling table: sizes at equal FLOPs, and the fit of exponents."""

import pytest

from experiments.tables import scaling
from experiments.tables.plan import arms_of
from experiments.tables.results import cost_of


@pytest.mark.long
def test_arms_that_are_compared_have_the_flops_they_claim():
    flops = {arm.name: cost_of(config).flops for arm, config in arms_of(scaling.SCALING, "cpu")}
    btt = flops["block tensor train, 1024"]
    assert (
        flops["low rank, 1024"]
        == btt
        == flops["block tensor train, dense rate, 1024"]
        == flops["block tensor train, one rate, 1024"]
    )
    assert 1 < btt / flops["dense"] < 1.06 and flops["dense, 512"] > 3 * btt
    assert flops["kronecker, 1024"] == btt and flops["tensor train, 1024"] > 1.8 * btt
    assert flops["monarch, 576"] > btt


def test_exponents_are_those_of_a_power_law_seed_by_seed():
    flops = [10.0, 100.0, 1000.0]
    found = [(int(f), [2 * f**-0.5, 3 * f**-0.25]) for f in flops]
    assert scaling.exponents(found) == pytest.approx([0.5, 0.25], abs=1e-6)


def test_widths_have_square_roots_and_rates_from_the_middle_one():
    for arm in scaling.SCALING.arms:
        name, width = arm.name.rsplit(", ", 1)
        assert int(width) == arm.changes["model.width"]
        assert arm.tuned_with in ("", "dense", f"{name}, 256") and (arm.tuned_with or width == "256")
