"""Members of Sparse-IFT have the dense model's FLOPs, by their non-zeros."""

import math

import pytest

from experiments.sparse_ift import MEMBERS, changes
from experiments.tables.bases import base_of
from experiments.tables.plan import changed
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError
from tests.marks import mostly_long, thinned

CASES = [(member, s) for s in (0.5, 0.75, 0.9) for member in MEMBERS]


def member_of(config, member, sparsity):
    return validate(changed(config, changes(config, member, sparsity), "test"))


def nonzeros(bound):
    """Multiply-adds of one row, by hand."""
    if hasattr(bound, "pattern"):
        return bound.pattern.count
    inner = [getattr(bound, name) for name in ("a", "b") if hasattr(bound, name)]
    inner = inner or getattr(getattr(bound, "branches", bound), "terms", ())
    return sum(map(nonzeros, inner)) if inner else bound.params


@pytest.mark.parametrize(("member", "sparsity"), mostly_long(CASES, CASES[4:7:2]))
def test_flops_of_nonzeros_are_those_of_the_dense_model(member, sparsity):
    config = base_of("cpu", "digits").make()
    dense, sparse = validate(config), member_of(config, member, sparsity)
    counted = 2 * sum(nonzeros(site.bound) for site in sparse.table.values())
    assert sparse.flops() == counted and abs(counted / dense.flops() - 1) < 0.02
    linear = [site.bound for site in sparse.table.values() if site.kind == "linear"]
    assert len(linear) == 3 and not any(bound.structure.name == "dense" for bound in linear)
    first, factor = linear[1], 1 / (1 - sparsity)
    if member == "wide":
        assert first.d_in == first.d_out == round(256 * math.sqrt(factor))
        assert first.structure.pattern.density == pytest.approx(1 - sparsity, rel=0.05)
        assert sparse.table["head"].bound.structure.name == "dense"
    elif member == "parallel":
        assert first.structure.count == round(factor)
    elif member == "factorised":
        assert first.structure.inner == math.ceil(round(128 * factor, 6))
    else:
        assert first.terms[1].structure.rank == int(128 * sparsity)


@pytest.mark.parametrize("member", thinned(MEMBERS, 2))
def test_convolutions_keep_their_flops_and_the_first_and_shortcuts_are_dense(member):
    config = default("images", "resnet_v1")
    config.model.update(depth=8, width=32)
    config.mup.enabled = False
    dense, sparse = validate(config, devices=1), member_of(config, member, 0.75)
    assert sparse.flops() == pytest.approx(dense.flops(), rel=0.02)
    kinds = {path: site.bound.structure.name == "dense" for path, site in sparse.table.items()}
    assert {path for path, still in kinds.items() if still} == {
        "stem/conv", "head", "layers_1/shortcut/conv", "layers_2/shortcut/conv"
    }  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
def test_no_sparsity_is_the_dense_model(member):
    config = base_of("cpu", "digits").make()
    assert changes(config, member, 0) == {}


@pytest.mark.long
@pytest.mark.parametrize("member", MEMBERS)
def test_language_models_keep_their_flops_and_whole_heads(member):
    config = default("lm")
    dense, sparse = validate(config), member_of(config, member, 0.5)
    assert abs(sparse.flops() / dense.flops() - 1) < 0.02
    assert sparse.table["head"].bound.structure.name == sparse.table["embed"].bound.structure.name == "dense"


def test_refused():
    config = base_of("cpu", "digits").make()
    for member, sparsity, said in (
        ("wider", 0.5, "did you mean 'wide'"),
        ("wide", 1.0, r"in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            changes(config, member, sparsity)
    with pytest.raises(ConfigError, match="what stays dense costs more than the whole"):
        changes(config, "wide", 0.9999)
    config.structure = "low_rank(rank=4)"
    with pytest.raises(ConfigError, match="starts from a dense model"):
        changes(config, "wide", 0.5)
