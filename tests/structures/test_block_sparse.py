"""Block sparse: supports, products against scipy, projections against all supports, and what the backward pass keeps."""

import contextlib
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse

import structmat
from structmat.parallel import make_mesh
from structmat.structures import StructureError, map_leaves
from structmat.structures.block_support import pattern_counts, static_rows
from tests.marks import mostly_long
from tests.structures.flops import count_flops

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def bind(text, n, m):
    return structmat.parse(text).bind(n, m)


@functools.cache
def setup(text, n, m):
    bound = bind(text, n, m)
    return bound, jax.jit(bound.init)(key(0))


def grid(pattern, rows, columns, count):
    """A static pattern as booleans (block rows, block columns)."""
    found = np.zeros((rows, columns), bool)
    found[static_rows(pattern, rows, columns, count), np.arange(columns)[:, None]] = True
    assert np.all(found.sum(axis=0) == count)
    return found


# -- the support -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["random", "magnitude", "butterfly", "banded"])
def test_every_column_holds_the_same_number_of_blocks(pattern):
    bound, params = setup(f"block_sparse(block=(3, 2), density=0.375, pattern='{pattern}')", 24, 48)
    rows = np.asarray(params["rows"])
    assert rows.shape == (24, 3) and rows.dtype == np.int32 and params["values"].shape == (24, 3, 3, 2)
    assert np.all(np.diff(rows, axis=1) > 0) and rows.min() >= 0 and rows.max() < 8
    assert np.all(np.sum(bound.materialize(params) != 0, axis=0) == 9)


def test_a_column_depends_on_the_key_and_its_place_alone():
    few, many = (bind("block_sparse(block=4, density=0.25)", 64, m) for m in (32, 96))
    draw = lambda bound, seed: np.asarray(jax.jit(bound.init)(jax.random.key(seed))["rows"])
    np.testing.assert_array_equal(draw(many, 3)[:8], draw(few, 3))
    assert np.any(draw(few, 4) != draw(few, 3)) and len({tuple(r) for r in draw(many, 3)}) > 15


@pytest.mark.parametrize("nodes", [1, 2, 8, 16])
def test_butterfly_is_the_union_of_the_papers_factors(nodes):
    """B_k = I kron [[1, 1], [1, 1]] kron I_(k/2), k = 2, 4, ..., the maximum stride, and the identity."""
    union, levels = np.eye(nodes), int(math.log2(nodes))
    assert pattern_counts("butterfly", nodes, nodes) == list(range(1, levels + 2))
    for level in range(levels + 1):
        if level:
            stride = 2**level
            union += np.kron(np.eye(nodes // stride), np.kron(np.ones((2, 2)), np.eye(stride // 2)))
        np.testing.assert_array_equal(grid("butterfly", nodes, nodes, level + 1), union > 0)


@pytest.mark.parametrize(
    ("rows", "columns", "counts"),
    [(12, 12, [1, 2, 3, 5]), (8, 24, [1, 2, 3, 4]), (24, 8, [3, 6, 9, 12]), (12, 18, [2, 4, 8]), (5, 7, [5])],
)
def test_butterfly_of_other_grids_is_mixed_radix_and_stretched(rows, columns, counts):
    nodes = math.gcd(rows, columns)
    radices, stride, union = {12: (2, 2, 3), 8: (2, 2, 2), 6: (2, 3), 1: ()}[nodes], 1, np.eye(nodes)
    assert pattern_counts("butterfly", rows, columns) == counts
    for count, radix in itertools.zip_longest(counts, radices):
        found = grid("butterfly", rows, columns, count)
        np.testing.assert_array_equal(found, np.kron(union, np.ones((rows // nodes, columns // nodes))) > 0)
        assert len(set(found.sum(axis=1))) == 1  # inputs are read equally often
        if radix:
            union += np.kron(np.eye(nodes // (stride * radix)), np.kron(np.ones((radix, radix)), np.eye(stride)))
            stride *= radix


def test_banded_wraps_round_the_diagonal():
    for count in (1, 3, 4, 8):
        first = np.roll(np.arange(8) < count, -((count - 1) // 2))
        np.testing.assert_array_equal(grid("banded", 8, 8, count), scipy.linalg.circulant(first))
    np.testing.assert_array_equal(grid("banded", 16, 4, 4), np.kron(np.eye(4), np.ones((4, 1))))
    np.testing.assert_array_equal(grid("banded", 4, 16, 1), np.kron(np.eye(4), np.ones((1, 4))))


@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (5, 12), (7, 11), (9, 6)])
def test_banded_follows_the_scaled_diagonal_and_reads_every_input(rows, columns):
    counts = pattern_counts("banded", rows, columns)
    assert counts == list(range(math.ceil(rows / columns), rows + 1))
    for count in counts:
        found = grid("banded", rows, columns, count)
        assert found.any(axis=1).all()
        for c in range(columns):  # consecutive once the middle is turned away from the ends, and centred
            turn = rows // 2 - int((c + 0.5) * rows / columns)
            at = np.flatnonzero(np.roll(found[:, c], turn))
            assert np.all(np.diff(at) == 1) and abs(at.mean() - rows // 2) <= 1


# -- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "m", "devices"),
    mostly_long(
        [
            ("block_sparse(block=4, density=0.25)", 32, 48, (1, 8)),
            ("block_sparse(block=(2, 5), density=0.5)", 12, 35, (1,)),
            ("block_sparse(block=(3, 1), density=0.34)", 9, 11, (8,)),
            ("block_sparse(block=(8, 6), density=1.0)", 16, 6, (1,)),
        ],
        [("block_sparse(block=(2, 5), density=0.5)", 12, 35, (1,))],
    ),
)
def test_products_equal_scipy(text, n, m, devices):
    """Block columns of W are block rows of W^T, so ELL is BSR with an even row pointer."""
    with jax.enable_x64(True):
        bound, x, y = bind(text, n, m), normal(2, 3, n), normal(3, 3, m)
        params = {"values": normal(4, *bound.leaves()["values"].shape), "rows": bound.init(key(1))["rows"]}
        values, rows = np.asarray(params["values"]), np.asarray(params["rows"])
        starts, blocks = np.arange(0, rows.size + 1, bound.count), values.transpose(0, 1, 3, 2).reshape(rows.size, -1)
        blocks = blocks.reshape(rows.size, *values.shape[:1:-1])
        w = scipy.sparse.bsr_matrix((blocks, rows.ravel(), starts), shape=(m, n)).T
        for count in devices:  # under a mesh a step of the scan serves several columns
            with jax.set_mesh(make_mesh({"tensor": 8})) if count > 1 else contextlib.nullcontext():
                xs, ys = jax.jit(lambda p, x, y: (bound.rmatmul(p, y), bound.matmul(p, x)))(params, x, y)
            np.testing.assert_allclose(xs, (w @ np.asarray(y).T).T, atol=1e-13)
            np.testing.assert_allclose(ys, (w.T @ np.asarray(x).T).T, atol=1e-13)
        np.testing.assert_array_equal(bound.materialize(params), w.toarray())


def test_a_mesh_splits_every_step_and_one_processor_takes_one_column():
    bound, params = setup("block_sparse(block=2, density=0.5)", 8, 48)  # 24 block columns
    steps = lambda: str(jax.make_jaxpr(bound.matmul)(params, jnp.ones((3, 8))))
    assert "length=24" in steps()
    with jax.set_mesh(make_mesh({"tensor": 8})):
        assert "length=3" in steps()
    assert "length=24" in steps()


def test_forward_pass_and_rows_form_no_dense_matrix():
    bound, params = setup("block_sparse(block=8, density=0.25)", 96, 80)
    dense = ("[96,80]", "[80,96]", "[10,12,8,8]", "[12,8,10,8]")
    forms = lambda fn, x: [shape for shape in dense if shape in str(jax.make_jaxpr(fn)(params, x))]
    assert not forms(bound.matmul, jnp.ones((5, 96))) and not forms(bound.take, jnp.arange(5))
    assert forms(lambda p, _: bound.materialize(p), 0)  # the check can fail


def test_sums_in_single_precision():
    """bf16 sums of ones stop at 256; both the product and the gradient of its input go beyond."""
    tall, wide = (bind("block_sparse(block=1, density=1.0)", *shape) for shape in ((1024, 1), (1, 1024)))
    ones = lambda bound: {
        "values": jnp.ones((bound.d_out, bound.d_in, 1, 1), jnp.bfloat16),
        "rows": jnp.broadcast_to(jnp.arange(bound.d_in, dtype=jnp.int32), (bound.d_out, bound.d_in)),
    }
    y = tall.matmul(ones(tall), jnp.ones((1, 1024), jnp.bfloat16))
    dx = jax.grad(lambda x: jnp.sum(wide.matmul(ones(wide), x).astype(jnp.float32)))(jnp.ones((1, 1), jnp.bfloat16))
    assert y.dtype == dx.dtype == jnp.bfloat16 and float(y[0, 0]) == float(dx[0, 0]) == 1024


# -- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_are_the_dense_ones_on_the_support():
    with jax.enable_x64(True):
        bound = bind("block_sparse(block=(4, 3), density=0.4)", 40, 30)
        params = bound.init(key(0), jnp.float64)
        x, target = normal(1, 7, 40), normal(2, 7, 30)
        loss = lambda y: jnp.sum((y - target) ** 2)
        own = jax.jit(jax.grad(lambda p, x: loss(bound.matmul(p, x)), (0, 1), allow_int=True))(params, x)
        dense = jax.grad(lambda w, x: loss(x @ w), (0, 1))(bound.materialize(params), x)
        blocks = dense[0].reshape(10, 4, 10, 3).transpose(2, 0, 1, 3)
        kept = np.stack([blocks[c, rows] for c, rows in enumerate(np.asarray(params["rows"]))])
        np.testing.assert_allclose(own[0]["values"], kept, atol=1e-12)
        np.testing.assert_allclose(own[1], dense[1], atol=1e-12)
        assert own[0]["rows"].dtype == jax.dtypes.float0


@pytest.mark.parametrize("side", ["matmul", "rmatmul"])
@pytest.mark.parametrize("mesh", [False, True])
def test_the_backward_pass_keeps_its_arguments_alone(side, mesh):
    bound, params = setup("block_sparse(block=4, density=0.25)", 96, 80)
    x = jnp.ones((5, 96 if side == "matmul" else 80))
    with jax.set_mesh(make_mesh({"tensor": 8})) if mesh else contextlib.nullcontext():
        back = jax.vjp(lambda p, x: getattr(bound, side)(p, x), params, x)[1]
    kept = [v.shape for v in jax.tree.leaves(back)]
    assert kept and set(kept) <= {x.shape, params["values"].shape, params["rows"].shape} and len(kept) <= 3


@pytest.mark.parametrize("mesh", [False, True])
def test_the_backward_pass_gathers_step_by_step(mesh):
    """Its temporary memory is a few copies of the activations, where all gathered panels would be 32."""
    bound = bind("block_sparse(block=16, density=0.5)", 1024, 1024)
    params, x = jax.eval_shape(bound.init, key(0)), jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    loss = jax.grad(lambda p, x: jnp.sum(bound.matmul(p, x) ** 2), (0, 1), allow_int=True)
    with jax.set_mesh(make_mesh({"tensor": 8})) if mesh else contextlib.nullcontext():
        memory = jax.jit(loss).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (16 if mesh else 6) * 512 * 1024 * 4


# -- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(), ("in_gram",), ("in_gram", "out_gram")], ids="+".join)
def test_magnitude_is_the_best_of_all_supports(weights):
    with jax.enable_x64(True):
        bound = bind("block_sparse(block=(2, 3), density=0.4, pattern='magnitude')", 10, 12)
        rng = np.random.default_rng(5)
        w, a, b = rng.normal(size=(10, 12)), rng.uniform(0.05, 9, 10), rng.uniform(0.05, 9, 12)
        grams = {"in_gram": a if "in_gram" in weights else None, "out_gram": b if "out_gram" in weights else None}
        params = bound.project(jnp.asarray(w), **{k: None if g is None else jnp.asarray(g) for k, g in grams.items()})
        power = w**2 * (a[:, None] if "in_gram" in weights else 1) * (b if "out_gram" in weights else 1)
        power = power.reshape(5, 2, 4, 3).sum(axis=(1, 3))
        best = [
            max(itertools.combinations(range(5), 2), key=lambda at, c=c: power[list(at), c].sum()) for c in range(4)
        ]
        np.testing.assert_array_equal(params["rows"], best)
        found = np.asarray(bound.materialize(params))
        np.testing.assert_array_equal(found, np.where(found != 0, w, 0))
        assert np.sum(found != 0) == 4 * 2 * 6 and bound.exact
    with pytest.raises(StructureError, match="full in_gram"):
        bound.project(jnp.asarray(w), in_gram=jnp.eye(10))


def test_ties_go_to_the_lower_row():
    bound = bind("block_sparse(block=2, density=0.5, pattern='magnitude')", 8, 4)
    np.testing.assert_array_equal(bound.project(jnp.ones((8, 4)))["rows"], [[0, 1], [0, 1]])


def test_random_projection_takes_the_blocks_of_its_support():
    bound, params = setup("block_sparse(block=4, density=0.5)", 24, 16)
    w = normal(5, 24, 16)
    kept = bound.project(w, like=params, in_gram=jnp.arange(24.0))
    np.testing.assert_array_equal(kept["rows"], params["rows"])
    np.testing.assert_array_equal(bound.materialize(kept), np.where(bound.materialize(params) != 0, w, 0))
    assert np.any(bound.project(w, key=jax.random.key(6))["rows"] != params["rows"]) and not bound.exact
    with pytest.raises(StructureError, match="needs key="):
        bound.project(w)


@pytest.mark.parametrize("pattern", ["butterfly", "banded"])
def test_static_patterns_project_without_a_key(pattern):
    bound, params = setup(f"block_sparse(block=4, density=0.5, pattern='{pattern}')", 16, 16)
    w = normal(5, 16, 16)
    found = bound.project(w)
    np.testing.assert_array_equal(found["rows"], params["rows"])
    np.testing.assert_array_equal(bound.materialize(found), np.where(bound.materialize(params) != 0, w, 0))
    assert bound.exact


# -- as a mask, and beside low rank ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["random", "butterfly", "banded", "magnitude"])
def test_mask(pattern):
    """Stored when drawn, static, or following the weights; the same support as the structure's own projection."""
    text = f"block_sparse(block=4, density=0.5, pattern='{pattern}')"
    masked, params = setup(f"masked(dense(), {text}, rule='plain')", 16, 16)
    bound, w = bind(text, 16, 16), params["weights"]["kernel"]
    assert ("rows" in params) == (pattern == "random")
    own = bound.project(w, like=params if pattern == "random" else None)
    np.testing.assert_array_equal(masked.materialize(params), bound.materialize(own))
    grown = {"kernel": w.at[:4].mul(100.0)}
    first = np.any(np.asarray(masked.materialize(params | {"weights": grown}))[:4] != 0, axis=0)
    assert bool(first.all()) == (pattern == "magnitude")


def test_pixelfly_is_a_sum():
    """Flat block butterfly plus low rank (Chen et al. 2022): product, gradients of every part, and both parts at work."""
    text = "block_sparse(block=4, density=0.375, pattern='butterfly') + low_rank(rank=3)"
    bound, params = setup(text, 32, 32)
    assert bound.params == 3 / 8 * 32 * 32 + 3 * 64
    low = {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(params["1"].items())}
    params = {"0": params["0"], "1": low}
    x, sparse = normal(9, 5, 32), np.asarray(bound.terms[0].materialize(params["0"]))
    dense = np.asarray(low["a"]).T @ low["b"] + sparse
    loss = lambda p: (jnp.sum((y := bound.matmul(p, x)) ** 2), y)
    grads, y = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))(params)
    np.testing.assert_allclose(y, np.asarray(x) @ dense, atol=1e-4)
    assert all(np.any(g) for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0)
    w = (normal(1, 32, 1) @ normal(2, 1, 32) + sparse + 0.01 * normal(3, 32, 32)).astype(jnp.float32)
    project = jax.jit(lambda w: [jnp.linalg.norm(w - b.materialize(b.project(w))) for b in (bound, *bound.terms)])
    both, *alone = project(w)
    assert both < 0.3 * min(alone)


# -- accounting, sizes and errors ------------------------------------------------------------------------------------


def test_cost_and_fans():
    bound, params = setup("block_sparse(block=(4, 8), density=0.25)", 96, 64)
    cost = bound.cost(7)
    assert (cost.params, cost.bits) == (96 * 64 / 4, 32 * (96 * 64 / 4 + 8 * 6))
    assert cost.flops == cost.flops_executed == 2 * 7 * 96 * 64 / 4
    assert cost.flops == count_flops(bound.matmul, params, jnp.ones((7, 96)))
    leaf = bound.leaves("embed", "mlp")["values"]
    assert (leaf.fan_in, leaf.fan_out) == (24, 16) and leaf.axes == ("mlp", None, "block_in", "block_out")
    flags = map_leaves(lambda leaf: (leaf.trainable, leaf.decay, leaf.axes[0]), bound.leaves("embed", "mlp"))
    assert flags == {"values": (True, True, "mlp"), "rows": (False, False, "mlp")}


@pytest.mark.parametrize(
    ("pattern", "count"), [("random", 4), ("magnitude", 4), ("banded", 4), ("butterfly", 3)]
)  # 1, 2, 3 and 5 blocks
def test_fit_takes_the_most_blocks_within_the_budget(pattern, count):
    bound = bind(f"fit(block_sparse(block=2, pattern='{pattern}'), params=0.4)", 24, 24)
    assert bound.count == count and bound.structure.pattern == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_sparse(block=5, density=0.5)", r"block=5 does not fit .* \(24, 16\); nearest valid: 1, 2, 4, 8"),
        ("block_sparse(block=(5, 3), density=0.5)", r"block=\(5, 3\) does not divide .*; nearest valid: \(4, 2\)"),
        ("block_sparse(block=(4, 4, 4), density=0.5)", "positive int or a pair"),
        ("block_sparse(block=0, density=0.5)", "positive int or a pair of them, got 0"),
        ("block_sparse(density=0.5)", "needs block"),
        ("block_sparse(block=4)", "needs density"),
        ("fit(block_sparse(), params=0.5)", "needs block"),
        ("block_sparse(block=4, density=1.5)", r"density must be in \(0, 1\], got 1.5"),
        ("block_sparse(block=4, density=0.05)", "asks for 0 of the 6 blocks .* nearest densities: 0.166667, 0.333333"),
        (
            "block_sparse(block=2, density=0.4, pattern='butterfly')",
            "asks for 5 of the 12 blocks .*='butterfly'.* nearest densities: 0.25, 0.5, 0.75",
        ),
        (
            "block_sparse(block=(2, 8), density=0.25, pattern='banded')",
            "asks for 3 of the 12 .*='banded'.* nearest densities: 0.5, 0.583333",
        ),
        ("block_sparse(block=4, density=0.5, pattern='band')", "did you mean 'banded'"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        bind(text, 24, 16)
