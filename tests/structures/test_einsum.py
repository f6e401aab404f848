"""Einsum structures against the entry formula, the families at their special points and the paper's accounting."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError, parse
from structmat.structures.einsum import Einsum
from structmat.structures.factors import divisors
from tests.marks import mostly_long
from tests.structures.flops import count_flops

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster
GENERIC = Einsum((3, 2, 4), (2, 3, 5), 2)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(bound, seed=0):
    return {n: jnp.asarray(normal(seed + k, *leaf.shape)) for k, (n, leaf) in enumerate(bound.leaves().items())}


def test_matrix_is_the_entry_formula():
    bound = GENERIC.bind(24, 30)
    params = draw(bound)
    a, b = np.asarray(params["A"], np.float64), np.asarray(params["B"], np.float64)
    w = np.zeros((24, 30))
    for g, q, p, f, e, d in itertools.product(range(4), range(2), range(3), range(5), range(3), range(2)):
        w[(g * 2 + q) * 3 + p, (f * 3 + e) * 2 + d] = sum(a[g, p, f, d, r] * b[f, g, q, r, e] for r in range(2))
    np.testing.assert_allclose(bound.materialize(params), w, atol=1e-5)


SPECIAL = {
    "block_low_rank(in_blocks=4, out_blocks=6, rank=2)": (
        Einsum((6, 1, 4), (1, 6, 6), 2),
        lambda p: {"A": p["R"][:, :, :, None], "B": p["L"][:, :, None]},
    ),
    "monarch(blocks=2, order='blocked')": (
        Einsum((12, 1, 2), (1, 18, 2), 6),
        lambda p: {"A": p["R"][:, :, :, None], "B": p["L"][:, :, None]},
    ),
    "low_rank(rank=5)": (
        Einsum((24, 1, 1), (1, 36, 1), 5),
        lambda p: {"A": p["a"].T[None, :, None, None], "B": p["b"][None, None, None]},
    ),
    "kronecker(terms=2)": (
        Einsum((4, 6, 1), (6, 6, 1), 2),
        lambda p: {
            "A": p["b"].transpose(1, 2, 0)[None, :, None],
            "B": p["a"].transpose(1, 0, 2)[None, None],
        },
    ),
    "tensor_train(rank=3)": (
        Einsum((4, 6, 1), (6, 6, 1), 3),
        lambda p: {
            "A": p["core1"][..., 0].transpose(1, 2, 0)[None, :, None],
            "B": p["core0"][0].transpose(0, 2, 1)[None, None],
        },
    ),
}


@pytest.mark.parametrize("text", mostly_long([*SPECIAL], [*SPECIAL][::3]))
def test_special_points(text):
    """The same cores give the dedicated family's matrix, the same costs and the same best approximation."""
    recipe, cores = SPECIAL[text]
    bound, known = recipe.bind(24, 36), parse(text).bind(24, 36)
    params = draw(known)
    member = known.materialize(params)
    np.testing.assert_allclose(bound.materialize(cores(params)), member, atol=1e-5)
    x = normal(9, 3, 24)
    np.testing.assert_allclose(bound.matmul(cores(params), x), known.matmul(params, x), atol=2e-5)
    assert bound.params == known.params
    w = normal(4, 24, 36)
    error = lambda b: float(jax.jit(lambda w: jnp.linalg.norm(w - b.materialize(b.project(w))))(w))
    assert error(bound) == pytest.approx(error(known), rel=1e-5)


@pytest.mark.parametrize(
    ("exponents", "text"),
    [
        ((0.5, 0, 0.5, 0, 0.5, 0.5, 0), "block_tensor_train(rank=1)"),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), "kronecker()"),
        ((1, 0, 0, 0, 1, 0, 0.5), "low_rank(rank=8)"),
        ((0.5, 0.5, 0, 0.5, 0.5, 0, 1 / 3), "tensor_train(rank=4)"),
    ],
)
def test_special_exponents_cost_what_the_families_do(exponents, text):
    """At theta of the paper's list, sizes that split evenly: parameters and FLOPs of the family."""
    found, known = Einsum(theta=exponents).bind(64, 256), parse(text).bind(64, 256)
    assert found.cost(1).params == known.cost(1).params
    if "tensor_train(rank=4" not in text:  # sizes differ: A first is not always the cheaper order
        assert found.cost(1).flops == known.cost(1).flops


# the paper's list: theta, and whether every parameter is used once (omega = 0) and the rank is full (psi = 1)
POINTS = [
    ((0.5, 0, 0.5, 0, 0.5, 0.5, 0), True, True),
    ((1, 0, 0, 0, 1, 0, 0.5), True, False),
    ((0.5, 0.5, 0, 0.5, 0.5, 0, 0), False, True),
    ((0.5, 0.5, 0, 0.5, 0.5, 0, 0.25), False, True),
    ((0.67, 0, 0.33, 0, 0.67, 0.33, 0), True, False),
    ((0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), False, True),
]


@pytest.mark.parametrize(("theta", "once", "full"), POINTS)
def test_paper_accounting(theta, once, full):
    """Parameters and MACs of the paper's formulas; A is used beta times and B delta times; rank of a random sample."""
    bound = Einsum(theta=theta).bind(64, 64)
    (alpha, beta, gamma), (delta, epsilon, phi), rho = (
        bound.structure.in_factors,
        bound.structure.out_factors,
        bound.structure.rank,
    )
    params = draw(bound)
    sizes = {n: p.size for n, p in params.items()}
    assert bound.params == sum(sizes.values())
    assert bound.params == phi * delta * rho * gamma * alpha + phi * epsilon * rho * gamma * beta
    macs = count_flops(bound.matmul, params, jnp.ones((1, 64))) / 2
    assert macs == phi * delta * rho * gamma * beta * (alpha + epsilon)
    assert macs == beta * sizes["A"] + delta * sizes["B"] == bound.cost(1).flops / 2
    assert (beta == delta == 1) == once
    with jax.enable_x64(True):
        sample = bound.materialize({n: jnp.asarray(np.asarray(p), jnp.float64) for n, p in params.items()})
    rank = np.linalg.matrix_rank(np.asarray(sample))
    most = min(64, rho * gamma * beta * phi * delta)
    assert rank == (64 if full else most) and (most == 64) == full


@pytest.mark.parametrize("n", [12, 60, 97, 343, 1024])
@pytest.mark.parametrize("exponents", [(0.5, 0.0, 0.5), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.34, 0.33, 0.33)])
def test_theta_takes_the_nearest_factors(n, exponents):
    """Exact factors, a 1 wherever the exponent is 0, and no other such factors are nearer in their logarithms."""
    found = Einsum(rank=1, theta=(*exponents, 1.0, 0.0, 0.0)).bind(n, 8).structure.in_factors
    far = lambda split: sum((math.log(v) - t * math.log(n)) ** 2 for v, t in zip(split, exponents))
    others = [(p, q, n // p // q) for p in divisors(n) for q in divisors(n) if n % (p * q) == 0]
    assert math.prod(found) == n and all(v == 1 for v, t in zip(found, exponents) if t == 0)
    assert far(found) <= min(map(far, others)) + 1e-9


def test_theta_resolves_to_text():
    bound = parse("einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.2))").bind(1024, 1024)
    spelled = "einsum(in_factors=(32, 8, 4), out_factors=(8, 32, 4), rank=4, theta=None, init='spectral', train=None)"
    assert str(bound.structure) == spelled and parse(spelled).bind(1024, 1024) == bound
    assert Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 1)).bind(64, 64).structure.rank == 8, "never above the full rank"
    assert Einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5), rank=3).bind(64, 64).structure.rank == 3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("einsum()", r"einsum needs in_factors=\.\.\."),
        ("einsum(in_factors=(4, 2, 3), out_factors=(4, 2, 3))", r"einsum needs rank=\.\.\."),
        (
            "einsum((5, 2, 3), (4, 2, 3), 1)",
            r"in_factors=\(5, 2, 3\) multiply to 30, not 24; nearest valid: \(4, 2, 3\)",
        ),
        ("einsum((1, 1, 1), (4, 2, 3), 1)", r"multiply to 1, not 24; nearest valid: \(4, 3, 2\)"),
        (
            "einsum((4, 2, 3), (4, 2, 3), 9)",
            r"rank=9 does not fit a weight of shape \(24, 24\); nearest valid: 1, 2, 3, 4",
        ),
    ],
)
def test_sizes_are_answered(recipe, message):
    with pytest.raises(StructureError, match=message):
        parse(recipe).bind(24, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_factors": (2, 3)}, r"in_factors must be three positive ints, got \(2, 3\)"),
        ({"out_factors": (2, 3, 0)}, "out_factors must be three positive ints"),
        ({"theta": (0.5, 0.5, 0, 0.5, 0.5, 0, 0), "in_factors": (1, 1, 1)}, "not both"),
        ({"theta": (0.5, 0.5, 0, 0.5, 0.5)}, r"theta must be 6 or 7 numbers in \[0, 1\]"),
        ({"theta": (1.5, -0.5, 0, 0.5, 0.5, 0)}, r"theta must be 6 or 7 numbers in \[0, 1\]"),
        ({"theta": (0.5, 0.5, 0, 0.5, 0.5, 0, 0), "rank": 2}, "leave out it or rank=2"),
        ({"theta": (0.5, 0.5, 0, 0.5, 0.2, 0)}, r"the out exponents of theta must sum to 1, got \(0.5, 0.2, 0.0\)"),
    ],
)
def test_arguments_are_answered(arguments, message):
    with pytest.raises(StructureError, match=message):
        Einsum(**arguments)


def tail(w, ins, outs, rank):
    """Sum of the discarded sigma^2 over the slices w[g, b a, f, e d], arranged as rows (a, d) and columns (b, e)."""
    (alpha, beta, gamma), (delta, epsilon, phi) = ins, outs
    digits = np.asarray(w, np.float64).reshape(gamma, beta, alpha, phi, epsilon, delta)
    total = 0.0
    for g, f in itertools.product(range(gamma), range(phi)):
        rows = [digits[g, :, a, f, :, d].ravel() for a in range(alpha) for d in range(delta)]
        total += float(np.sum(np.linalg.svd(np.array(rows), compute_uv=False)[rank:] ** 2))
    return total


def test_projection_is_optimal_inside_the_cube():
    bound, w = GENERIC.bind(24, 30), normal(0, 24, 30)
    found = float(jax.jit(lambda w: jnp.sum((w - bound.materialize(bound.project(w))) ** 2))(w))
    assert found == pytest.approx(tail(w, (3, 2, 4), (2, 3, 5), 2), rel=1e-5)
    with jax.enable_x64(True):
        member = bound.materialize({n: jnp.asarray(np.asarray(p), jnp.float64) for n, p in draw(bound).items()})
        again = bound.materialize(bound.project(member))
        assert jnp.linalg.norm(again - member) < 1e-13 * jnp.linalg.norm(member)
    best = structmat.project(w, Einsum((3, 2, 4), (2, 3, 5), 6)).materialize()
    np.testing.assert_allclose(best, w, atol=1e-5, err_msg="full rank is every matrix")


@pytest.mark.long
@pytest.mark.parametrize(
    ("side", "ins", "outs"),
    [
        ("in_gram", (1, 6, 4), (3, 2, 4)),
        ("in_gram", (6, 1, 4), (3, 2, 4)),
        ("out_gram", (3, 2, 4), (1, 6, 4)),
        ("out_gram", (3, 2, 4), (6, 1, 4)),
    ],
)
def test_diagonal_grams_where_they_factorise(side, ins, outs):
    """A factor of 1 on the gram's side: the weighted optimum. Both above 1: refused."""
    w, gram = normal(0, 24, 24), np.random.default_rng(1).uniform(0.1, 3, 24).astype(np.float32)
    root = gram[:, None] ** 0.5 if side == "in_gram" else gram**0.5
    bound = Einsum(ins, outs, 1).bind(24, 24)
    best = bound.materialize(bound.project(w, **{side: gram}))
    assert np.sum((root * (w - best)) ** 2) == pytest.approx(tail(root * w, ins, outs, 1), rel=1e-5)
    other = {"in_gram": "out_gram", "out_gram": "in_gram"}[side]
    with pytest.raises(StructureError, match=f"no closed form with {other}"):
        bound.project(w, **{other: gram})
    assert bound.grams == "none" and Einsum((1, 6, 4), (6, 1, 4), 1).bind(24, 24).grams == "diagonal"
    with pytest.raises(StructureError, match="a full"):
        bound.project(w, **{side: np.diag(gram)})


def test_fit_chooses_the_rank():
    for recipe in ("einsum()", "einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5))", "einsum((8, 2, 4), (2, 8, 4))"):
        found = parse(f"fit({recipe}, params=0.5)").bind(64, 64)
        larger = Einsum(found.structure.in_factors, found.structure.out_factors, found.structure.rank + 1)
        assert found.params <= 0.5 * 64 * 64 < larger.bind(64, 64).params
    with pytest.raises(StructureError, match="nothing to choose"):
        parse("fit(einsum(theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0)), params=0.5)").bind(64, 64)
