"""Which sums take one pass over x."""

import jax
import numpy as np
import pytest

import structmat
from structmat.structures import fused


@pytest.mark.parametrize(
    ("text", "one_pass"),
    [
        ("low_rank(rank=2) + block_sparse(block=4, density=0.5)", True),
        ("block_sparse(block=4, density=0.5) + low_rank(rank=2)", True),
        ("low_rank(rank=2) + frozen(block_sparse(block=4, density=0.5))", False),
        ("low_rank(rank=2) + scaled(block_sparse(block=4, density=0.5), 2.0)", False),
        ("low_rank(rank=2) + block_sparse(block=4, density=0.5) + low_rank(rank=1)", False),
        ("low_rank(rank=2) + low_rank(rank=1)", False),
    ],
)
def test_only_the_bare_pair(monkeypatch, text, one_pass):
    calls = []
    operation = fused.low_rank_plus_block_sparse
    monkeypatch.setattr(fused, "low_rank_plus_block_sparse", lambda *a: calls.append(1) or operation(*a))
    bound = structmat.parse(text).bind(16, 12)
    params, x = bound.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (3, 16))
    params = jax.tree.map(lambda p: p + 0.1 if p.dtype != "int32" else p, params)
    np.testing.assert_allclose(bound.matmul(params, x), x @ bound.materialize(params), atol=1e-5)
    assert bool(calls) == one_pass
