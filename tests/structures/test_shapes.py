"""Properties over sizes: whatever binds multiplies, counts and projects as it says; whatever does not, says why."""

import math

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import structmat
from structmat import StructureError
from structmat.structures.errors import nearest
from tests.structures.flops import count_flops

sizes = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 12, 16, 18, 24, 30])
small = st.integers(1, 6)
texts = st.one_of(
    st.just("dense()"),
    st.just("diagonal()"),
    st.builds("low_rank(rank={})".format, small),
    st.builds("spectral(rank={})".format, small),
    st.builds("block_diagonal(blocks={})".format, small),
    st.builds("block_low_rank(in_blocks={}, out_blocks={}, rank={})".format, small, small, st.integers(1, 3)),
    st.builds("monarch(blocks={}, order={!r})".format, st.integers(1, 4), st.sampled_from(["paper", "blocked"])),
    st.builds("kronecker(terms={})".format, small),
    st.builds("tensor_train(rank={}, cores={})".format, small, st.integers(2, 4)),
)
terms = st.one_of(
    texts,
    st.builds("transpose({})".format, texts),
    st.builds("scaled({}, s=0.5)".format, texts),
    st.builds("{} + {}".format, texts, texts),
    st.builds("product({}, {}, inner={})".format, texts, texts, sizes),
)
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])


def bind(text, d_in, d_out):
    """The Bound, or None with the error checked to name the family and a number."""
    try:
        return structmat.parse(text).bind(d_in, d_out)
    except StructureError as error:
        message = str(error)
        assert any(name in message for name in structmat.structures.FAMILIES), message
        assert any(c.isdigit() for c in message), message
        return None


@few
@given(text=terms, d_in=sizes, d_out=sizes, seed=st.integers(0, 99))
def test_product_and_counts(text, d_in, d_out, seed):
    bound = bind(text, d_in, d_out)
    assume(bound is not None)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    x = rng.normal(size=(2, d_in)).astype(np.float32)
    y, w = jax.jit(lambda p, x: (bound.matmul(p, x), bound.materialize(p)))(params, x)
    assert w.shape == (d_in, d_out)
    np.testing.assert_allclose(y, x @ np.asarray(w), atol=1e-5 * (1 + np.abs(x).sum() * np.abs(w).max()))
    assert bound.params == sum(p.size for p in jax.tree.leaves(params))
    assert bound.cost(2).flops == count_flops(bound.matmul, params, x)


@few
@given(text=texts, d_in=sizes, d_out=sizes)
def test_text_names_the_bound(text, d_in, d_out):
    bound = bind(text, d_in, d_out)
    assume(bound is not None)
    assert structmat.parse(str(bound.structure)).bind(d_in, d_out) == bound
    flipped = bound.transpose()
    assert (flipped.d_in, flipped.d_out, flipped.params) == (d_out, d_in, bound.params)


@settings(few, max_examples=12)
@given(
    family=st.sampled_from(["low_rank", "spectral", "block_diagonal", "monarch", "kronecker", "tensor_train"]),
    sizes=st.sampled_from([(16, 24), (36, 12), (12, 12), (64, 32)]),
    metric=st.sampled_from(["params", "flops", "bits"]),
    budget=st.floats(0.02, 1),
)
def test_fit_is_the_largest_within_its_budget(family, sizes, metric, budget):
    recipe = structmat.parse(family)
    dense = getattr(structmat.parse("dense()").bind(*sizes).cost(1), metric)
    costs = [getattr(c.bind(*sizes).cost(1), metric) for c in recipe.candidates((sizes[0],), (sizes[1],))]
    assert costs == sorted(costs)
    fitting = [c for c in costs if c <= budget * dense]
    try:
        found = structmat.parse(f"fit({family}(), {metric}={budget!r})").bind(*sizes)
    except StructureError as error:
        assert not fitting and "smallest member" in str(error)
    else:
        assert getattr(found.cost(1), metric) == max(fitting)
        assert math.prod(found.in_shape) == sizes[0]


def test_sizes_in_the_billions_are_bound_and_refused_at_once():
    side = 2**30
    assert structmat.parse("low_rank(rank=8)").bind(side, side).params == 16 * side
    with pytest.raises(StructureError, match=r"rank=2000000000 does not fit .* nearest valid: 1073741819, "):
        structmat.parse("low_rank(rank=2000000000)").bind(side, side)
    assert nearest(50, range(1, 1000), 4) == "48, 49, 50, 51" and nearest(-3, range(1, 1000), 3) == "1, 2, 3"
    for value in (-5, 0, 7, 13, 40, 99):
        assert nearest(value, range(0, 60, 4), 3) == nearest(value, list(range(0, 60, 4)), 3)
