"""Elementwise products: text, the route a product takes, the size at the start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat import StructureError, parse
from structmat.nn import StructuredEmbed
from structmat.structures import Product, Sum, flatten_leaves
from structmat.structures.dense import Dense
from structmat.structures.elementwise import Elementwise
from structmat.structures.low_rank import LowRank
from structmat.structures.monarch import Monarch
from tests.optim.width import feature_update

A, B, C = LowRank(2), Monarch(4), Dense()
key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


@pytest.mark.parametrize(
    ("text", "structure", "short"),
    [
        ("low_rank(2) * monarch(4)", Elementwise(A, B), "low_rank(rank=2) * monarch(blocks=4)"),
        ("low_rank(2) * monarch(4) * dense()", Elementwise(Elementwise(A, B), C), None),
        (
            "low_rank(2) * (monarch(4) * dense())",
            Elementwise(A, Elementwise(B, C)),
            "low_rank(rank=2) * (monarch(blocks=4) * dense())",
        ),
        (
            "low_rank(2) + monarch(4) * dense()",
            Sum((A, Elementwise(B, C))),
            "low_rank(rank=2) + monarch(blocks=4) * dense()",
        ),
        (
            "(low_rank(2) + monarch(4)) * dense()",
            Elementwise(Sum((A, B)), C),
            "(low_rank(rank=2) + monarch(blocks=4)) * dense()",
        ),
        ("dense() * (low_rank(2) + monarch(4))", Elementwise(C, Sum((A, B))), None),
        ("low_rank(2) * monarch(4) @ dense()", Product(Elementwise(A, B), C), None),
        ("low_rank(2) * (monarch(4) @ dense())", Elementwise(A, Product(B, C)), None),
        ("elementwise(low_rank(2), monarch(4))", Elementwise(A, B), "low_rank(rank=2) * monarch(blocks=4)"),
        ("fit(low_rank() * dense() + low_rank(), params=0.5)", None, None),
    ],
)
def test_text(text, structure, short):
    found = parse(text)
    assert structure is None or found == structure
    assert parse(str(found)) == found == parse(found.short()) and hash(parse(str(found))) == hash(found)
    assert short is None or found.short() == short


def test_operators():
    assert A * B == parse("low_rank(2) * monarch(4)") and A * B + C == parse("low_rank(2) * monarch(4) + dense()")
    assert str((A + B) * C) == str(parse("(low_rank(2) + monarch(4)) * dense()"))
    with pytest.raises(TypeError):
        A * "dense()"


@pytest.mark.parametrize("multiply", [lambda: 0.5 * A, lambda: A * 0.5, lambda: parse("low_rank(2) * 0.5")])
def test_numbers_are_told_of_scaled(multiply):
    with pytest.raises(StructureError, match=r"write scaled\(low_rank\((rank=)?2\), s=0.5\)"):
        multiply()


def test_numbers_in_text_show_the_place():
    with pytest.raises(StructureError) as error:
        parse("dense() + 2 * low_rank(2)")
    assert str(error.value).endswith("  dense() + 2 * low_rank(2)\n            ^")
    with pytest.raises(StructureError, match="set init on the parts"):
        parse("elementwise(dense(), dense(), init='paper')")


def draw(bound, seed=0):
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


ROUTES = [
    ("low_rank(rank=2) * low_rank(rank=3)", "rank 0"),
    ("low_rank(rank=3) * low_rank(rank=2)", "rank 1"),
    ("low_rank(rank=2) * kronecker()", "rank 0"),
    ("block_diagonal(blocks=4) * spectral(rank=2)", "rank 1"),
    ("block_diagonal(blocks=4) * frozen(scaled(transpose(spectral(rank=2)), s=-3.0))", "rank 1"),
    ("transpose(low_rank(rank=2)) * block_low_rank(in_blocks=4, out_blocks=4, rank=1)", "rank 0"),
    ("low_rank(rank=2) * dense()", "dense"),
    ("low_rank(rank=12) * low_rank(rank=12)", "dense"),
    ("kronecker() * block_diagonal(blocks=4)", "dense"),
    ("diagonal() * low_rank(rank=2)", "diagonal"),
    ("dense() * scaled(frozen(transpose(diagonal())), s=-2.0)", "diagonal"),
    ("diagonal() * transpose(scaled(spectral(rank=2), s=2.0))", "diagonal"),
]


@pytest.mark.parametrize(("text", "route"), ROUTES)
def test_every_route_is_the_exact_product(text, route):
    """All routes give x @ (A * B) and its transpose, take rows, and cost what they say; `dense` is the worst case."""
    bound = parse(text).bind(24, 24)
    params, x = draw(bound), jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 24)), jnp.float32)
    a, b = (np.asarray(side.materialize(params[k]), np.float64) for side, k in ((bound.a, "0"), (bound.b, "1")))
    w = a * b
    tolerance = 1e-5 * np.abs(w).max() * 24

    @jax.jit
    def results(params, x):
        return (
            bound.materialize(params),
            bound.matmul(params, x),
            bound.rmatmul(params, x),
            bound.take(params, jnp.array([5])),
        )

    for found, expected in zip(results(params, x), (w, np.asarray(x) @ w, np.asarray(x) @ w.T, w[[5]])):
        np.testing.assert_allclose(found, expected, atol=tolerance)
    assert bound.route == route
    assert bound.cost(512).flops <= bound._materialize_flops() + 2 * 512 * 24 * 24


def test_low_rank_routes_never_form_the_matrix():
    for text, formed in (("low_rank(rank=2) * kronecker()", False), ("kronecker() * kronecker()", True)):
        bound = parse(text).bind(36, 64)
        jaxpr = str(jax.make_jaxpr(bound.matmul)(draw(bound), jnp.ones((5, 36))))
        assert ("36,64]" in jaxpr) == formed


def test_ranks_multiply():
    """FedPara's reason: two factors of rank r give rank r^2."""
    bound = parse("low_rank(rank=3) * low_rank(rank=4)").bind(24, 30)
    assert np.linalg.matrix_rank(np.asarray(bound.materialize(draw(bound))), tol=1e-3) == 12
    assert bound.params == 7 * (24 + 30)


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "sizes", "spectral"),
    [
        ("dense() * dense()", (24, 12), 0.5),
        ("low_rank(rank=2) * low_rank(rank=3)", (24, 24), 6 / 24),
        ("low_rank(rank=6) * low_rank(rank=6)", (24, 36), 1),
        ("diagonal() * dense()", (24, 24), 1),
        ("dense() * low_rank(rank=2) * kronecker()", (24, 24), 1),
        ("dense() * (low_rank(rank=2) + monarch(blocks=2))", (16, 24), 1),
        ("frozen(low_rank(rank=4)) * hadamard()", (16, 16), 1),
    ],
)
def test_size_at_the_start(text, sizes, spectral):
    """E[y^2] for x of variance 1, over many draws: the documented law, and 1 under `variance`."""
    for mode, expected in (("spectral", spectral), ("variance", 1)):
        full = parse(text if mode == "spectral" else _with_mode(text, mode)).bind(*sizes)
        power = lambda k: jnp.sum(full.materialize(full.init(k)) ** 2) / full.d_out  # noqa: B023, called at once
        drawn = np.asarray(jax.jit(jax.vmap(power))(jax.random.split(key(0), 600)))
        assert abs(drawn.mean() - expected) < 5 * drawn.std() / 600**0.5 + 1e-5


def _with_mode(text, mode):
    for name in ("dense(", "diagonal(", "kronecker(", "low_rank(", "monarch("):
        text = text.replace(name, f"{name}init='{mode}', ")
    return text.replace(", )", ")")


def test_the_gain_goes_where_it_acts():
    """On b; on a where b is frozen or fixed; zero starts at the zero matrix with a leaf that can leave it."""
    for text, scaled in (("dense() * dense()", "1"), ("dense() * frozen(dense())", "0"), ("dense() * hadamard()", "0")):
        bound = parse(text).bind(16, 16)
        zero = {name: leaf for name, leaf in flatten_leaves(bound.leaves(gain=0.0)) if leaf.std == 0}
        assert [name[0] for name in zero] == [scaled] and all(leaf.trainable for leaf in zero.values())
    with pytest.raises(StructureError, match="no leaf that scales the matrix"):
        parse("hadamard() * hadamard()").bind(16, 16).leaves(gain=0.5)
    start = parse("frozen(dense()) + frozen(dense()) * low_rank(rank=2)").bind(12, 16)
    params = start.init(key(0))
    np.testing.assert_array_equal(start.materialize(params), params["0"]["kernel"])


def test_shares_count_the_factors_of_both_sides():
    shares = lambda text: [leaf.share for _, leaf in flatten_leaves(parse(text).bind(16, 16).leaves())]
    assert shares("low_rank(rank=2) * dense()") == [3, 3, 3]
    assert shares("low_rank(rank=2) * low_rank(rank=2)") == [4] * 4
    assert shares("low_rank(rank=2) * frozen(dense())") == [2, 2, 1]


def test_feature_updates_are_flat_in_width():
    """With structure-aware learning rates, as for every structure; FedPara's rank is sqrt(width)."""
    updates = [feature_update(f"low_rank(rank={r}) * low_rank(rank={r})", r * r) for r in (8, 32)]
    assert max(updates) / min(updates) < 1.5, updates


@pytest.mark.parametrize("init", ["spectral", "variance"])
def test_embedding_rows_have_size_one(init):
    text = f"low_rank(rank=8, init='{init}') * low_rank(rank=8, init='{init}')"
    table = StructuredEmbed(256, 64, text)
    rows = table.init_with_output(key(0), jnp.arange(256))[0]
    assert 0.7 < float(jnp.mean(rows**2)) < 1.4


def test_projection_is_refused():
    for text in ("dense() * dense()", "frozen(dense()) * low_rank(rank=2)"):
        with pytest.raises(StructureError, match="no projection onto an elementwise product"):
            parse(text).bind(12, 12).project(jnp.ones((12, 12)))
