"""tucker, cp and tensor_ring as matrices: how sizes become axes, closed forms, counts, rows, fit."""

import bisect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from tests.structures.flops import count_flops

FAMILIES = ["tucker(rank=2)", "cp(rank=3)", "tensor_ring(rank=2)"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(bound, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes)


def error(w, text):
    return float(np.linalg.norm(w - structmat.project(w, text).materialize()))


@pytest.mark.parametrize(
    ("text", "sizes", "axes"),
    [
        ("tucker(rank=2)", (24, 36), (4, 6, 6, 6)),
        ("tucker(rank=2, modes=1)", (24, 35), (24, 35)),
        ("tucker(rank=2, modes=3)", ((2, 5), 64), (2, 5, 4, 4, 4)),
        ("cp(rank=2)", ((3, 3, 8), 24), (3, 3, 8, 4, 6)),
        ("cp(rank=2)", ((4, 1, 6), (2, 3)), (4, 1, 6, 2, 3)),
    ],
)
def test_axes_of_a_weight(text, sizes, axes):
    """Several axes of a side stay, a plain side is split."""
    bound = structmat.parse(text).bind(*sizes)
    assert bound.format.axes == axes
    for name, leaf in bound.leaves().items():
        assert name == "core" or leaf.shape[0] == axes[int(name.removeprefix("factor"))]


def test_pairs_of_a_ring():
    """The split of tensor_train; a side of as many axes as there are cores keeps them."""
    ring, train = (structmat.parse(f"tensor_{n}(rank=2, cores=3)").bind(24, 36) for n in ("ring", "train"))
    assert ring.format.modes == train.format.modes == ((4, 3), (3, 3), (2, 4))
    assert structmat.parse("tensor_ring(rank=2)").bind((2, 3, 5), (4, 9)).format.modes == ((2, 3), (3, 3), (5, 4))


def test_parameters_in_closed_form():
    count = lambda text: structmat.parse(text).bind(24, 36).params
    assert count("tensor_ring(rank=5)") == 25 * (4 * 3 + 3 * 3 + 2 * 4)
    assert count("tucker(rank=3)") == 3**4 + 3 * (4 + 6 + 6 + 6)
    assert count("tucker(rank=(2, 3, 4, 5))") == 2 * 3 * 4 * 5 + 2 * 4 + 3 * 6 + 4 * 6 + 5 * 6
    assert count("cp(rank=7)") == 7 * (4 + 6 + 6 + 6)


def test_special_cases_are_truncated_svds():
    """With one axis a side tucker and cp are low rank; a ring of two cores is a sum of rank^2 Kronecker products."""
    w = normal(24, 36)
    tail = np.linalg.norm(np.linalg.svd(w, compute_uv=False)[5:])
    assert error(w, "tucker(rank=5, modes=1)") == pytest.approx(tail, rel=1e-5)
    assert error(w, "cp(rank=5, modes=1)") == pytest.approx(tail, rel=1e-5)
    assert error(w, "tensor_ring(rank=2, cores=2)") == pytest.approx(error(w, "kronecker(terms=4)"), rel=1e-5)


def test_entries_by_their_definition():
    """One entry of each family from its cores, index by index."""
    i, j = 17, 29
    tucker, cp, ring = (structmat.parse(t).bind(24, 36) for t in FAMILIES)
    (i1, i2), (j1, j2) = divmod(i, 6), divmod(j, 6)
    p = drawn(tucker)
    vectors = [p[f"factor{k}"][at] for k, at in enumerate((i1, i2, j1, j2))]
    expected = {tucker: np.einsum("abcd,a,b,c,d->", p["core"], *vectors)}
    q = drawn(cp)
    expected[cp] = np.sum(np.prod([q[f"factor{k}"][at] for k, at in enumerate((i1, i2, j1, j2))], axis=0))
    r = drawn(ring)
    ins, outs = np.unravel_index(i, (4, 3, 2)), np.unravel_index(j, (3, 3, 4))
    expected[ring] = np.trace(np.linalg.multi_dot([r[f"core{k}"][:, ins[k], outs[k]] for k in range(3)]))
    for bound, value in expected.items():
        np.testing.assert_allclose(bound.materialize(drawn(bound))[i, j], value, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("text", ["tucker(rank=4)", "cp(rank=6)", "tensor_ring(rank=2)"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_flops_at_few_and_many_rows(text, rows):
    """cp goes factor by factor for few rows and by a Khatri-Rao product for many: the cheaper, and as counted."""
    bound = structmat.parse(text).bind((6, 4), (3, 2, 5)) if "ring" not in text else structmat.parse(text).bind(64, 48)
    x = normal(rows, bound.d_in)
    params = drawn(bound)
    assert bound.cost(rows).flops == count_flops(bound.matmul, params, x)
    np.testing.assert_allclose(bound.matmul(params, x), x @ bound.materialize(params), rtol=1e-4, atol=1e-3)
    if text.startswith("cp"):
        beside = bound.cost(rows).flops - 2 * rows * 6 * (24 + 30)
        assert beside == 6 * (min(rows * 6, 6 * 4) + min(rows * (3 + 3 * 2), 3 * 2 + 3 * 2 * 5))


def test_a_ring_starts_where_it_is_cheapest():
    """The first pair expands 2 to 9 and the last shrinks 9 to 2: the ring is walked backwards."""
    bound = structmat.parse("tensor_ring(rank=2)").bind((2, 8, 9), (9, 4, 2))
    assert bound._order == ((2, 1, 0), True) and bound.last == "core0"
    forwards = structmat.parse("tensor_ring(rank=2)").bind((9, 8, 2), (2, 4, 9))
    assert forwards._order == ((0, 1, 2), False) and bound.cost(1).flops == forwards.cost(1).flops
    params, x = drawn(bound), normal(5, 144)
    assert bound.cost(5).flops == count_flops(bound.matmul, params, x)
    np.testing.assert_allclose(bound.matmul(params, x), x @ bound.materialize(params), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("text", FAMILIES)
def test_embedding_rows_without_the_table(text):
    """`take` of three rows of a (4096, 64) table computes and holds far less than the table."""
    bound = structmat.parse(text).bind(4096, 64)
    params, ids = drawn(bound), np.array([[5], [4095], [77]], np.int32)
    assert count_flops(bound.take, params, ids) < 4096 * 64
    jaxpr = jax.make_jaxpr(bound.take)(params, ids).jaxpr
    assert max(v.aval.size for e in jaxpr.eqns for v in e.outvars) < 4096
    np.testing.assert_allclose(bound.take(params, ids), bound.materialize(params)[ids], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["params", "flops", "bits"])
@pytest.mark.parametrize("family", ["tucker", "cp", "tensor_ring"])
def test_fit_takes_the_largest_member(family, metric):
    sizes, budget = (48, 96), 0.5
    cost = lambda s: getattr(s.bind(*sizes).cost(1), metric)
    members = structmat.parse(family).candidates((48,), (96,))
    costs = [cost(m) for m in members]
    assert costs == sorted(costs) and len(set(members)) == len(members)
    limit = budget * cost(structmat.parse("dense()"))
    found = structmat.parse(f"fit({family}(), {metric}={budget})").bind(*sizes)
    assert cost(found.structure) == costs[bisect.bisect_right(costs, limit) - 1] <= limit
    assert structmat.parse(str(found.structure)).bind(*sizes) == found


def test_fit_raises_tucker_ranks_in_proportion():
    """To uneven axes uneven ranks, so that no axis is kept whole while another is thinned."""
    ranks = structmat.parse("fit(tucker(modes=1), params=0.3)").bind((3, 3, 64), 64).format.ranks
    assert ranks[2] == ranks[3] > 4 * ranks[0] and ranks[0] == ranks[1] < 3


def test_cp_candidates_are_few_for_large_weights():
    """All ranks to 1024, then steps below 0.1 %."""
    ranks = [c.rank for c in structmat.parse("cp").candidates((4096,), (4096,))]
    steps = np.diff(ranks)
    assert ranks[:1024] == list(range(1, 1025)) and len(ranks) < 8000 and ranks[-1] <= 64**3
    assert np.all(steps >= 1) and np.all(steps <= np.maximum(1, np.array(ranks[:-1]) / 1024))


@pytest.mark.long
@pytest.mark.parametrize("text", FAMILIES)
def test_complex_matrices(text):
    """A complex matrix gives complex parameters; a member is recovered; no conjugate sneaks into the products."""
    bound = structmat.parse(text).bind(12, 8)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) + 1j * rng.normal(size=s.shape), jnp.complex64)
    params = jax.tree.map(draw, shapes)
    member = np.asarray(bound.materialize(params))
    found = jax.jit(bound.project)(member)
    assert {p.dtype for p in found.values()} == {jnp.dtype("complex64")}
    assert np.linalg.norm(bound.materialize(found) - member) < 2e-3 * np.linalg.norm(member)
    x = (rng.normal(size=(3, 12)) + 1j * rng.normal(size=(3, 12))).astype(np.complex64)
    expected = x @ member
    np.testing.assert_allclose(bound.matmul(params, x), expected, atol=1e-4 * np.abs(expected).max())
    y = x[:, :8]
    np.testing.assert_allclose(bound.rmatmul(params, y), y @ member.T, atol=1e-4 * np.abs(y @ member.T).max())


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("tucker(rank=7)", (24, 36), "tucker: rank=7 does not fit a weight of shape (24, 36); nearest valid: 1, 2, 3, 4, 5, 6"),
        ("tucker(rank=(2, 2))", (24, 36), "2 ranks (2, 2) for 4 axes (4, 6, 6, 6)"),
        ("tucker(rank=(5, 2, 2, 2))", (24, 36), "ranks (5, 2, 2, 2) do not fit axes (4, 6, 6, 6)"),
        ("tucker(rank=0)", (24, 36), "tucker: rank must be at least 1, got 0"),
        ("tucker(rank=(2, 0))", (24, 36), "tucker: rank must be at least 1, got (2, 0)"),
        ("tucker(rank=2)", (7, 36), "tucker: d_in=7 has 1 prime factors and cannot be split into 2"),
        ("tucker()", (24, 36), "tucker needs rank=..."),
        ("cp(rank=145)", (24, 36), "cp: rank=145 does not fit a weight of shape (24, 36); nearest valid: 139, 140, 141, 142, 143, 144"),
        ("cp(rank=2, modes=0)", (24, 36), "cp: modes must be at least 1, got 0"),
        ("tensor_ring(rank=13)", (24, 36), "tensor_ring: rank=13 does not fit a weight of shape (24, 36); nearest valid: 7, 8, 9, 10, 11, 12"),
        ("tensor_ring(rank=2, cores=1)", (24, 36), "tensor_ring: cores must be at least 2, got 1"),
        ("tensor_ring(rank=2)", (24, 14), "tensor_ring: d_out=14 has 2 prime factors and cannot be split into 3"),
    ],
)  # fmt: skip
def test_refusals(text, sizes, message):
    with pytest.raises(StructureError) as caught:
        structmat.parse(text).bind(*sizes)
    assert message in str(caught.value)


def test_sharded_axes_follow_the_weights_own():
    """Names go to the first factor of a split side, to each axis of a side that has them."""
    split = structmat.parse("tucker(rank=2)").bind(24, 36).leaves("embed", "mlp")
    assert [split[f"factor{k}"].axes[0] for k in range(4)] == ["embed", None, "mlp", None]
    kept = structmat.parse("cp(rank=2)").bind(24, (4, 9)).leaves("embed", ("heads", "head_dim"))
    assert [kept[f"factor{k}"].axes[0] for k in range(4)] == ["embed", None, "heads", "head_dim"]
    ring = structmat.parse("tensor_ring(rank=2)").bind(24, 36).leaves("embed", "mlp")
    assert ring["core0"].axes == (None, "embed", "mlp", None) and ring["core1"].axes == (None,) * 4
