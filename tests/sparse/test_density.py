"""Densities of layers add up to that of the model, and bind."""

import math
import types

import pytest

import structmat
from structmat.nn import Site
from structmat.sparse import densities, rules_text
from structmat.structures import Rules, StructureError
from structmat.training.config import validate
from tests.training.small_runs import small_digits


def site(in_shape, out_shape, kind="linear"):
    return Site(structmat.parse("dense()").bind(in_shape, out_shape), kind)


SITES = {"a": site(512, 512), "b": site(512, 64), "c": site((3, 3, 16), 32, "conv"), "head": site(64, 10, "head")}
ALL = ("linear", "conv", "head")


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("how", ["uniform", "erk"])
def test_the_sum_is_the_density_asked_for(density, how):
    found = densities(SITES, density, how, ALL)
    sizes = {path: s.bound.d_in * s.bound.d_out for path, s in SITES.items()}
    assert list(found) == list(SITES) and all(0 < d <= 1 for d in found.values())
    assert sum(found[p] * sizes[p] for p in sizes) == pytest.approx(density * sum(sizes.values()), rel=1e-9)


def test_erk_follows_the_sides_and_fills_small_layers_first():
    found = densities(SITES, 0.05, "erk", ALL)
    raw = {"a": 1024 / 512**2, "b": 576 / (512 * 64), "c": (3 + 3 + 16 + 32) / (9 * 16 * 32)}
    assert found["head"] == 1.0
    for path in "abc":
        assert found[path] / found["a"] == pytest.approx(raw[path] / raw["a"])
    assert found["a"] < 0.05 < found["b"]
    assert set(densities(SITES, 0.05)) == {"a", "b"}


def test_rules_text_is_a_structure_of_the_config():
    config = small_digits()
    config.model.update(layers=2, width=32)
    text = rules_text(validate(config).table, 0.2, "erk", ("linear", "head"), rescale=True)
    config.structure = text
    bounds = {path: s.bound for path, s in validate(config).table.items()}
    wanted = densities({p: types.SimpleNamespace(bound=b, kind="linear") for p, b in bounds.items()}, 0.2)
    assert list(bounds) == list(wanted) == ["head", "layers_0", "layers_1"]
    for path in bounds:
        size = math.prod(bounds[path].in_shape) * math.prod(bounds[path].out_shape)
        assert bounds[path].pattern.count == round(wanted[path] * size) and bounds[path].pattern.gain > 1
    assert Rules.of(rules_text(SITES, 1.0)).resolve({"a": "linear", "b": "linear"}) == dict.fromkeys(
        "ab", structmat.parse("dense()")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"density must be in \(0, 1\], got 0.0"),
        ((0.1, "ekr"), "how got 'ekr'; did you mean 'erk'"),
        ((0.1, "erk", ("embed",)), "no site of kind embed; there are: linear, conv, head"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(StructureError, match=message):
        densities(SITES, *arguments)
