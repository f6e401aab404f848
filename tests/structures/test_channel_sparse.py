"""Channel sparse: whole rows or columns against scipy and brute force, gradients, and the equations of LOST."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import structmat
from structmat.parallel import collectives, make_mesh, spec_for
from structmat.structures import StructureError, map_leaves
from tests.structures.flops import count_flops

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster
axes = pytest.mark.parametrize("axis", ["in", "out"])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def bind(text, n, m):
    return structmat.parse(text).bind(n, m)


@functools.cache
def setup(text, n, m):
    bound = bind(text, n, m)
    return bound, jax.jit(bound.init)(key(0))


def draw(text, n, m):
    """Double precision parameters on the support of init; call with x64 enabled."""
    bound, params = setup(text, n, m)
    return bound, {"values": normal(5, *params["values"].shape), "index": params["index"]}


# -- the support and the product -------------------------------------------------------------------------------------


@axes
def test_channels_are_distinct_ascending_and_drawn_from_the_key(axis):
    bound = bind(f"channel_sparse(density=0.2, axis='{axis}')", 40, 60)
    init = jax.jit(bound.init)
    index = [np.asarray(init(jax.random.key(seed))["index"]) for seed in range(3)]
    size = 40 if axis == "in" else 60
    for drawn in index:
        assert drawn.shape == (size // 5,) and drawn.dtype == np.int32
        assert np.all(np.diff(drawn) > 0) and drawn.min() >= 0 and drawn.max() < size
    assert np.any(index[0] != index[1]) and np.any(index[1] != index[2])
    np.testing.assert_array_equal(index[0], init(jax.random.key(0))["index"])


@axes
def test_products_equal_scipy(axis):
    with jax.enable_x64(True):
        bound, params = draw(f"channel_sparse(density=0.25, axis='{axis}')", 24, 32)
        values, index = np.asarray(params["values"]), np.asarray(params["index"])
        if axis == "in":
            w = scipy.sparse.csr_matrix((np.ones(6), (index, np.arange(6))), shape=(24, 6)) @ values
        else:
            w = (scipy.sparse.csr_matrix((np.ones(8), (index, np.arange(8))), shape=(32, 8)) @ values.T).T
        assert np.sum(np.any(w, axis=1 if axis == "in" else 0)) == len(index)
        x, y = normal(1, 2, 3, 24), normal(2, 2, 3, 32)
        np.testing.assert_array_equal(bound.materialize(params), w)
        np.testing.assert_allclose(bound.matmul(params, x), np.asarray(x) @ w, atol=1e-13)
        np.testing.assert_allclose(bound.rmatmul(params, y), np.asarray(y) @ w.T, atol=1e-13)
        ids = jnp.asarray([[0, 23], [int(index[0]), 7]])
        np.testing.assert_array_equal(bound.take(params, ids), w[ids])


@axes
def test_all_channels_are_dense(axis):
    with jax.enable_x64(True):
        bound = bind(f"channel_sparse(density=1.0, axis='{axis}', select='norm')", 12, 20)
        w, x = normal(0, 12, 20), normal(1, 5, 12)
        params = bound.project(w)
        np.testing.assert_array_equal(params["values"], w)
        np.testing.assert_allclose(bound.matmul(params, x), x @ w, atol=1e-13)
        assert bound.params == 240


# -- gradients -------------------------------------------------------------------------------------------------------


@axes
def test_gradient_reaches_the_kept_channels_alone(axis):
    with jax.enable_x64(True):
        bound, params = draw(f"channel_sparse(density=0.25, axis='{axis}')", 24, 32)
        x, target = normal(1, 7, 24), normal(2, 7, 32)
        loss = lambda y: jnp.sum((y - target) ** 2)
        own = jax.jit(jax.grad(lambda p, x: loss(bound.matmul(p, x)), (0, 1), allow_int=True))(params, x)
        dense = jax.grad(lambda w, x: loss(x @ w), (0, 1))(bound.materialize(params), x)
        index = params["index"]
        np.testing.assert_allclose(
            own[0]["values"], dense[0][index] if axis == "in" else dense[0][:, index], atol=1e-12
        )
        np.testing.assert_allclose(own[1], dense[1], atol=1e-12)
        assert own[0]["index"].dtype == jax.dtypes.float0
        dropped = np.setdiff1d(np.arange(24), index)
        assert np.any(own[1][:, dropped]) == (axis == "out")


@axes
def test_the_backward_pass_keeps_kept_channels_and_no_dense_matrix(axis):
    bound, params = setup(f"channel_sparse(density=0.125, axis='{axis}')", 96, 80)
    x = jnp.ones((50, 96))
    kept = [v.shape for v in jax.tree.leaves(jax.vjp(lambda p, x: bound.matmul(p, x), params, x)[1])]
    wide = {"in": (50, 12), "out": (50, 96)}[axis]
    assert wide in kept and not {(96, 80), (80, 96)} & set(kept)
    assert sum(map(np.prod, kept)) <= np.prod(wide) + 2 * sum(p.size for p in jax.tree.leaves(params))
    assert "[96,80]" not in str(jax.make_jaxpr(bound.matmul)(params, x))
    assert "[96,80]" not in str(jax.make_jaxpr(bound.take)(params, jnp.arange(5)))


# -- projection ------------------------------------------------------------------------------------------------------


def psd(n, seed):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return a @ a.T / n + 0.05 * np.eye(n)


@axes
@pytest.mark.parametrize("grams", ["none", "diagonal", "full on the other side"])
def test_norm_is_the_best_of_all_subsets(axis, grams):
    """Against the weighted error of every pair of channels, each with its best values by least squares."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(5, 6)) ** 3  # heavy tails: the order of the norms depends on which norm
    a, b = {"none": (None, None), "diagonal": (rng.uniform(0.05, 9, 5), rng.uniform(0.05, 9, 6))}.get(
        grams, (rng.uniform(0.05, 9, 5), psd(6, 1)) if axis == "in" else (psd(5, 1), rng.uniform(0.05, 9, 6))
    )
    full = lambda g, n: np.eye(n) if g is None else np.diag(g) if g.ndim == 1 else g
    left, right = np.linalg.cholesky(full(a, 5)).T, np.linalg.cholesky(full(b, 6))

    def least(index):
        """Least squares over matrices with these channels, as a linear map of their entries."""
        keep = np.zeros((5, 6), bool)
        keep[(list(index), slice(None)) if axis == "in" else (slice(None), list(index))] = True
        design = np.kron(left, right.T)[:, keep.ravel()]
        goal = (left @ w @ right).ravel()
        return np.linalg.norm(goal - design @ np.linalg.lstsq(design, goal, rcond=None)[0])

    pairs = list(itertools.combinations(range(5 if axis == "in" else 6), 2))
    best = min(pairs, key=least)
    with jax.enable_x64(True):
        bound = bind(f"channel_sparse(density={2 / (5 if axis == 'in' else 6)!r}, axis='{axis}', select='norm')", 5, 6)
        array = lambda g: None if g is None else jnp.asarray(g)
        params = bound.project(jnp.asarray(w), in_gram=array(a), out_gram=array(b))
        np.testing.assert_array_equal(params["index"], best)
        error = np.linalg.norm(left @ (w - np.asarray(bound.materialize(params))) @ right)
        assert error == pytest.approx(least(best), rel=1e-10) and bound.exact


@axes
def test_ties_go_to_the_lower_channel(axis):
    bound = bind(f"channel_sparse(density=0.5, axis='{axis}', select='norm')", 6, 6)
    np.testing.assert_array_equal(bound.project(jnp.ones((6, 6)))["index"], [0, 1, 2])


@axes
def test_random_projection_takes_its_channels(axis):
    bound, params = setup(f"channel_sparse(density=0.5, axis='{axis}')", 12, 12)
    w = normal(4, 12, 12)
    kept = bound.project(w, like=params, in_gram=jnp.arange(12.0))
    np.testing.assert_array_equal(kept["index"], params["index"])
    np.testing.assert_array_equal(bound.materialize(kept), np.where(bound.materialize(params) != 0, w, 0))
    assert np.any(bound.project(w, key=jax.random.key(6))["index"] != params["index"]) and not bound.exact
    with pytest.raises(StructureError, match="needs key="):
        bound.project(w)
    with pytest.raises(StructureError, match=f"full {axis}_gram"):
        bound.project(w, like=params, **{f"{axis}_gram": jnp.eye(12)})


@axes
@pytest.mark.parametrize("select", ["random", "norm"])
def test_mask(axis, select):
    text = f"channel_sparse(density=0.25, axis='{axis}', select='{select}')"
    masked, params = setup(f"masked(dense(), {text}, rule='plain')", 16, 16)
    bound, w = bind(text, 16, 16), params["weights"]["kernel"]
    assert ("index" in params) == (select == "random")
    own = bound.project(w, like=params if select == "random" else None)
    np.testing.assert_array_equal(masked.materialize(params), bound.materialize(own))
    heavy = w.at[:4].mul(100.0) if axis == "in" else w.at[:, :4].mul(100.0)
    found = np.asarray(masked.materialize(params | {"weights": {"kernel": heavy}})) != 0
    assert bool(np.all(found[:4] if axis == "in" else found[:, :4])) == (select == "norm")


# -- LOST ------------------------------------------------------------------------------------------------------------


def lost(w, rank, count):
    """The decomposition as published, in numpy: truncated SVD, then the largest rows of what is left."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    rest = w - low
    assert np.linalg.norm(rest) ** 2 == pytest.approx(np.sum(s[rank:] ** 2))
    index = np.sort(np.argsort(-np.linalg.norm(rest, axis=1), kind="stable")[:count])
    sparse = np.zeros_like(w)
    sparse[index] = rest[index]
    return low, sparse, index


@pytest.mark.long
def test_lost_from_a_dense_matrix():
    """One pass by hand gives LOST; the projection of the sum starts from it and is nearer."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        w = rng.normal(size=(24, 20)) * rng.uniform(0.2, 2, size=(24, 1))
        low, sparse, index = lost(w, 3, 6)
        bound = bind("low_rank(rank=3) + channel_sparse(density=0.25, select='norm')", 24, 20)
        first = bound.terms[0].project(jnp.asarray(w))
        second = bound.terms[1].project(w - bound.terms[0].materialize(first))
        np.testing.assert_array_equal(second["index"], index)
        by_hand = bound.materialize({"0": first, "1": second})
        np.testing.assert_allclose(by_hand, low + sparse, atol=1e-12)
        x = normal(1, 5, 24)
        own = bound.matmul({"0": first, "1": second}, x)
        np.testing.assert_allclose(own, x @ low + x[:, index] @ sparse[index], atol=1e-12)
        found = jax.jit(lambda w: bound.materialize(bound.project(w)))(w)
        assert np.linalg.norm(w - found) < 0.999 * np.linalg.norm(w - by_hand)
        assert bound.params == 3 * (24 + 20) + 6 * 20


def test_lost_limits():
    """gamma = 1/2 and every channel: twice the output is x W; no channel left out, nothing lost."""
    with jax.enable_x64(True):
        w, x = normal(0, 12, 10), normal(1, 4, 12)
        half = bind("scaled(low_rank(rank=2), 0.5) + scaled(channel_sparse(density=1.0, select='norm'), 0.5)", 12, 10)
        low, rest = half.terms[0].inner, half.terms[1].inner
        first = low.project(w)
        params = {"0": first, "1": rest.project(w - low.materialize(first))}
        np.testing.assert_allclose(2 * half.matmul(params, x), x @ w, atol=1e-12)


def test_a_low_rank_teacher_with_heavy_channels_is_found():
    rng = np.random.default_rng(2)
    heavy = np.array([3, 17, 21])
    w = rng.normal(size=(32, 2)) @ rng.normal(size=(2, 28))
    w[heavy] += 2 * rng.normal(size=(3, 28))
    text = "low_rank(rank=2) + channel_sparse(density={}, select='{}')"
    solve = lambda select: jax.jit(
        lambda w: (p := (b := bind(text.format(3 / 32, select), 32, 28)).project(w, key=key(1)), b.materialize(p))
    )(w.astype(np.float32))
    params, found = solve("norm")
    np.testing.assert_array_equal(params["1"]["index"], heavy)
    error = np.linalg.norm(w - found)
    assert error < 0.05 * np.linalg.norm(w) and error < 0.2 * np.linalg.norm(w - solve("random")[1])


# -- accounting, initialisation and errors ---------------------------------------------------------------------------


@axes
def test_cost_fans_and_axes(axis):
    bound, params = setup(f"channel_sparse(density=0.25, axis='{axis}')", 96, 64)
    cost, count = bound.cost(7), {"in": 24, "out": 16}[axis]
    assert (cost.params, cost.bits) == (96 * 64 / 4, 32 * (96 * 64 / 4 + count))
    assert (
        cost.flops == cost.flops_executed == 2 * 7 * 96 * 64 / 4 == count_flops(bound.matmul, params, jnp.ones((7, 96)))
    )
    leaves = bound.leaves("embed", "mlp")
    assert (leaves["values"].fan_in, leaves["values"].fan_out) == {"in": (24, 64), "out": (96, 16)}[axis]
    flags = map_leaves(lambda leaf: (leaf.trainable, leaf.decay, leaf.axes), leaves)
    assert flags["index"] == (False, False, (None,))
    assert flags["values"] == (True, True, {"in": (None, "mlp"), "out": ("embed", None)}[axis])


@axes
def test_kept_outputs_start_at_the_size_of_a_dense_layer(axis):
    """E[y^2] = E[x^2] for init='variance' on every output the structure can reach, the others are zero."""
    bound = bind(f"channel_sparse(density=0.25, axis='{axis}', init='variance')", 256, 128)
    w = np.asarray(bound.materialize(jax.jit(bound.init)(key(0))))
    power = np.sum(w**2, axis=0)
    reached = power[power > 0]
    assert len(reached) == {"in": 128, "out": 32}[axis] and reached.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("axis", "sites", "want"),
    [
        ("in", ("embed", "mlp"), {}),
        ("out", ("mlp", "embed"), {"all-reduce": 1}),
        ("in", ("mlp", "embed"), {"all-reduce": 1}),
        ("out", ("embed", "mlp"), {}),
    ],
)
def test_collectives(axis, sites, want):
    """Column-parallel sends nothing, row-parallel one reduction of the kept entries alone."""
    mesh = make_mesh({"data": 2, "tensor": 4})
    bound = bind(f"channel_sparse(density=0.0625, axis='{axis}')", 256, 256)
    put = lambda shape, dtype, names: jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, spec_for(mesh, names, shape))
    )
    params = map_leaves(lambda leaf: put(leaf.shape, leaf.dtype or jnp.float32, leaf.axes), bound.leaves(*sites))
    x = put((64, 256), jnp.float32, ("batch", sites[0] if sites[0] == "mlp" else None))
    y = put((64, 256), jnp.float32, ("batch", sites[1] if sites[1] == "mlp" else None)).sharding
    sent = collectives(jax.jit(bound.matmul, out_shardings=y).lower(params, x).compile().as_text())
    assert {kind: traffic.count for kind, traffic in sent.items()} == want
    assert all(traffic.bytes == 32 * 16 * 4 for traffic in sent.values())


def test_fit_takes_the_most_channels_within_the_budget():
    bound = bind("fit(channel_sparse(axis='out'), params=0.3)", 10, 20)
    assert bound.count == 6 and bound.structure.axis == "out"
    assert bind("fit(low_rank(rank=2) + channel_sparse(select='norm'), params=0.5)", 20, 20).terms[1].count == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("channel_sparse(density=0)", r"density must be in \(0, 1\], got 0"),
        ("channel_sparse(density=1.5)", r"density must be in \(0, 1\], got 1.5"),
        ("channel_sparse(density=0.01)", "leaves none of 24 channels; smallest density is 0.0416667"),
        ("channel_sparse(density=0.01, axis='out')", "leaves none of 16 channels; smallest density is 0.0625"),
        ("channel_sparse()", "needs density"),
        ("channel_sparse(density=0.5, select='magnitude')", "valid: random, norm"),
        ("channel_sparse(density=0.5, axis='row')", "valid: in, out"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        bind(text, 24, 16)
