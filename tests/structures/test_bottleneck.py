"""A nonlinearity between two structures: values, accounting, and refusal of all that needs a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import StructuredDense, choose_path
from structmat.structures import Matrix, StructureError, parse
from structmat.training.config import default, validate

TEXT = "bottleneck(dense(), dense(), inner=12)"


@pytest.mark.parametrize(
    ("activation", "law"), [("silu", jax.nn.silu), ("relu", lambda h: h * (h > 0)), ("tanh", jnp.tanh)]
)
def test_values_are_those_of_two_layers(activation, law):
    bound = parse(f"bottleneck(dense(), low_rank(rank=3), inner=12, activation='{activation}')").bind(16, 20)
    params = bound.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 16))
    b = params["1"]["a"].T @ params["1"]["b"]
    np.testing.assert_allclose(bound.matmul(params, x), law(x @ params["0"]["kernel"]) @ b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        bound.take(params, jnp.arange(16)), bound.matmul(params, jnp.eye(16)), rtol=1e-5, atol=1e-6
    )


def test_it_counts_as_its_parts():
    bound = parse(TEXT).bind(16, 20)
    assert bound.params == 12 * 16 + 12 * 20 and bound.cost(7).flops == 2 * 7 * bound.params
    found = parse("fit(bottleneck(dense(), dense()), params=0.5)").bind(16, 20).structure
    assert found.inner == 0.5 * 16 * 20 // 36 and parse(str(found)) == found
    half = parse("fit(bottleneck(n_m_sparse(2, 4), dense()), params=0.9)").bind(16, 20)
    assert half.structure.inner == int(0.9 * 320 / (8 + 20))
    assert {leaf.share for part in bound.leaves().values() for leaf in part.values()} == {2}


@pytest.mark.parametrize("text", [TEXT, f"scaled({TEXT}, s=0.5) + channel_sparse(density=0.25)", f"frozen({TEXT})"])
def test_what_needs_a_matrix_is_refused(text):
    bound = parse(text).bind(16, 20)
    params = bound.init(jax.random.key(0))
    assert not bound.is_linear and choose_path(bound, 10**6)[0] == "factored"
    for call in (
        lambda: bound.materialize(params),
        lambda: bound.rmatmul(params, jnp.ones((2, 20))),
        lambda: bound.project(jnp.ones((16, 20))),
        lambda: Matrix(bound, params).error(jnp.ones((16, 20))),
        lambda: StructuredDense(20, text, path="dense").init(jax.random.key(0), jnp.ones((2, 16))),
    ):
        with pytest.raises(StructureError, match="is not a matrix"):
            call()
    assert parse("low_rank(rank=2) + dense()").bind(16, 20).is_linear


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bottleneck(dense(), dense())", "inner"),
        ("bottleneck(dense(), dense(), inner=0)", "inner=0"),
        ("bottleneck(dense(), dense(), inner=4, activation='sulu')", "silu"),
    ],
)
def test_bad_arguments(text, said):
    with pytest.raises(StructureError, match=said):
        parse(text).bind(16, 20)


def test_a_model_takes_it():
    config = default("lm")
    config.structure = ".*mlp.* -> fit(bottleneck(dense(), dense()), params=0.3)"
    config.model.update(layers=1, width=32, heads=2)
    config.mup.base_width = 32
    assert validate(config).table["layers_0/mlp/up"].bound.structure.inner == int(0.3 * 32 * 128 / 160)
