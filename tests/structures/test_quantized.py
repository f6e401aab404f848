"""Quantised weights: grids, packing, scales against brute force, storage in bytes, and LQ-LoRA's sum."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import StructureError, map_leaves
from structmat.structures import quantization as qz
from structmat.structures.reparam import fake_quantize
from structmat.structures.stacks import project_stack
from tests.marks import mostly_long, thinned
from tests.structures.flops import count_flops

BITS = (2, 3, 4, 8)
GRIDS = ("int", "normal")
every_grid = pytest.mark.parametrize(("bits", "grid"), thinned(list(itertools.product(BITS, GRIDS)), 3))

FORMS = [(b, g, True) for b in BITS for g in GRIDS] + [(2, "int", False), (8, "int", False), (4, "normal", False)]
every_form = pytest.mark.parametrize(("bits", "grid", "symmetric"), thinned(FORMS, 3))


def form(bits, grid, symmetric):
    """The text of a form whose groups are thirds of a row of 48."""
    return f"quantized({bits}, group=16, axis='out', symmetric={symmetric}, grid='{grid}')"


NF4 = [  # as published with QLoRA (Dettmers et al. 2023, appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def bind(text, n, m):
    return structmat.parse(text).bind(n, m)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def projector(text, n, m):
    bound = bind(text, n, m)
    return jax.jit(lambda w, **kwargs: (found := bound.project(w, **kwargs), bound.materialize(found)))


def nearest(text, w, **kwargs):
    """The matrix of the projection of w."""
    return np.asarray(projector(text, *w.shape)(w, **kwargs)[1])


# -- grids and storage -----------------------------------------------------------------------------------------------


def test_normal_float_equals_the_published_values():
    np.testing.assert_allclose(qz.level_table(4, "normal"), NF4, atol=1e-6)


@every_grid
def test_levels_are_ascending_and_hold_zero(bits, grid):
    levels = np.array(qz.level_table(bits, grid))
    assert len(levels) == 2**bits and np.all(np.diff(levels) > 0) and 0.0 in levels
    if grid == "int":
        np.testing.assert_array_equal(levels, np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    else:
        assert (levels[0], levels[-1]) == (-1, 1)


@pytest.mark.long
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 5, 24])
def test_packing_is_a_round_trip_of_the_bytes_it_says(bits, size):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, size))
    packed = qz.pack(jnp.asarray(codes), bits)
    assert packed.dtype == np.uint8 and packed.shape == (3, qz.packed_bytes(size, bits))
    assert size * bits / 8 <= packed.shape[1] < size * bits / 8 + qz.word(bits)[0]
    np.testing.assert_array_equal(qz.unpack(packed, bits)[:, :size], codes)


@pytest.mark.parametrize(("bits", "size"), [(2, 1 / 4), (3, 3 / 8), (4, 1 / 2), (8, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stored_bits_are_the_bytes_of_the_arrays(bits, size, dtype):
    bound = bind(f"quantized({bits})", 256, 40)
    params = jax.eval_shape(functools.partial(bound.init, dtype=dtype), jax.random.key(0))
    assert params["codes"].shape == (40, 256 * size)
    width = jnp.dtype(dtype).itemsize * 8
    cost = bound.cost(1, dtype)
    assert cost.bits == 8 * sum(p.size * p.dtype.itemsize for p in params.values())
    assert cost.bits == 256 * 40 * (bits + width / 128) and cost.params == 2 * 40
    offsets = bind(f"quantized({bits}, symmetric=False)", 256, 40).cost(1, dtype)
    assert offsets.bits == 256 * 40 * (bits + 2 * width / 128) and offsets.params == 4 * 40


# -- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("bits", "grid", "group"),
    mostly_long([(2, "int", 6), (2, "normal", 6), (3, "normal", 4), (4, "int", 3)], [(3, "normal", 4)]),
)
def test_optimal_scales_equal_brute_force_over_all_codes(bits, grid, group, weighted):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, group)) + rng.normal(size=(30, 1))
    weights = rng.uniform(0.01, 3, group) if weighted else np.ones(group)
    levels = qz.level_table(bits, grid)
    with jax.enable_x64(True):
        scales, codes = qz.optimal_fit(jnp.asarray(x), jnp.asarray(weights), levels)
        found = x - np.asarray(scales)[:, None] * np.array(levels)[codes]
    every = np.array(list(itertools.product(levels, repeat=group)))
    along, square = (x * weights) @ every.T, (every**2) @ weights
    gain = np.max(np.where(square > 0, along**2 / np.where(square > 0, square, 1), 0), axis=1)
    best = np.sum(weights * x**2, axis=1) - gain
    np.testing.assert_allclose(np.sum(weights * found**2, axis=1), best, atol=1e-12)


@pytest.mark.long
@every_form
def test_never_worse_than_plain_rounding(bits, grid, symmetric):
    """Of every single group, against rounding to the range of the group in numpy."""
    w, levels = normal(2, 10, 48) + 0.3, np.array(qz.level_table(bits, grid))
    groups = w.reshape(10, 3, 16)
    if symmetric:
        scale, offset = np.abs(groups).max(-1, keepdims=True) / levels[-1], 0
    else:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scale = (high - low) / (levels[-1] - levels[0])
        offset = low - scale * levels[0]
    codes = np.abs((groups - offset)[..., None] / scale[..., None] - levels).argmin(-1)
    plain = np.sum((groups - scale * levels[codes] - offset) ** 2, axis=-1)
    ours = np.sum((groups - nearest(form(bits, grid, symmetric), w).reshape(groups.shape)) ** 2, axis=-1)
    assert np.all(ours <= plain * (1 + 1e-5))
    assert ours.sum() < (0.98 if bits < 8 else 1) * plain.sum()


@pytest.mark.long
def test_both_axes_group_consecutive_entries():
    """Against fake quantisation, which rounds runs of a row; the other axis is its transpose."""
    w = normal(3, 12, 32)
    for bits in (3, 8):
        plain = np.linalg.norm(w - fake_quantize(jnp.asarray(w), bits, 8))
        out = nearest(f"quantized({bits}, group=8, axis='out')", w)
        assert np.linalg.norm(w - out) < plain
        np.testing.assert_allclose(nearest(f"quantized({bits}, group=8)", w.T.copy()).T, out, atol=1e-5)


@every_form
def test_dequantised_matrices_are_fixed_points(bits, grid, symmetric):
    once = nearest(form(bits, grid, symmetric), normal(4, 10, 48))
    np.testing.assert_allclose(nearest(form(bits, grid, symmetric), once), once, atol=2e-6 * np.abs(once).max())


def test_rounding_to_the_range_is_off_by_half_a_step_at_most():
    x = normal(5, 40, 16)
    for bits in BITS:
        levels = qz.level_table(bits, "int")
        scale = np.abs(x).max(-1, keepdims=True) / levels[-1]
        rounded = scale * np.array(levels)[qz.nearest_codes(jnp.asarray(x / scale), levels)]
        assert np.all(np.abs(x - rounded) <= scale / 2 * (1 + 1e-5))


@every_form
def test_zero_and_constant_groups(bits, grid, symmetric):
    w = np.zeros((10, 48), np.float32)
    w[1, :16], w[2, 32:] = 0.7, -3.0
    params, found = projector(form(bits, grid, symmetric), 10, 48)(w)
    np.testing.assert_allclose(found, w, atol=1e-6)
    assert all(np.all(np.isfinite(p)) for p in params.values())


@pytest.mark.long
@pytest.mark.parametrize("text", ["quantized(3, group=8)", "quantized(8, group=8)", "quantized(2, 8, symmetric=False)"])
def test_grams_weigh_entries_within_a_group(text):
    w, rng = normal(6, 24, 10), np.random.default_rng(7)
    a, b = (rng.uniform(0.01, 3, n).astype(np.float32) ** 2 for n in (24, 10))
    a[8:16] = 0
    size = lambda left: np.sum(a[:, None] * np.asarray(left, np.float64) ** 2 * b)
    plain, weighted = nearest(text, w), nearest(text, w, in_gram=a, out_gram=b)
    assert size(w - weighted) < 0.97 * size(w - plain)
    np.testing.assert_allclose(weighted[8:16], plain[8:16], atol=1e-6)  # not seen: fitted as if unweighted
    np.testing.assert_array_equal(nearest(text, w, out_gram=b), plain)  # weighs whole columns
    with pytest.raises(StructureError, match=r"full in_gram .* no closed form"):
        bind(text, 24, 10).project(w, in_gram=jnp.eye(24))


def test_a_stack_is_projected_as_its_members():
    stack = np.stack([normal(s, 10, 48) for s in (14, 15)])
    for bits in (2, 8):
        bound, params = project_stack(stack, form(bits, "int", True))
        each = np.stack([nearest(form(bits, "int", True), w) for w in stack])
        np.testing.assert_allclose(jax.vmap(bound.materialize)(params), each, atol=1e-5)


def test_lines_in_chunks_give_what_the_whole_gives(monkeypatch):
    w = normal(8, 16, 13)
    bound = bind("quantized(3, group=8)", 16, 13)
    whole = jax.jit(lambda w: bound.project(w))(w)
    monkeypatch.setattr("structmat.structures.quantized.CHUNK", 5 * 16 * 8)
    chunks = jax.jit(lambda w: bound.project(w))(w)
    np.testing.assert_array_equal(whole["codes"], chunks["codes"])
    np.testing.assert_allclose(whole["scales"], chunks["scales"], rtol=1e-6)


# -- products --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("bits", [2, 3])
def test_rows_where_lines_end_in_padding(axis, bits):
    n, m = (10, 6) if axis == "in" else (6, 10)
    bound = bind(f"quantized({bits}, group=5, axis='{axis}', symmetric=False)", n, m)
    params = bound.init(jax.random.key(0)) | {"offsets": normal(9, 6, 2)}
    ids = np.array([[3, 0], [n - 1, 3]])
    np.testing.assert_allclose(bound.take(params, ids), bound.materialize(params)[ids], atol=1e-6)


@pytest.mark.parametrize("side", ["matmul", "rmatmul"])
def test_the_backward_pass_keeps_no_dense_matrix(side):
    bound = bind("quantized(4, group=16)", 96, 80)
    params, x = bound.init(jax.random.key(0)), jnp.ones((5, 96 if side == "matmul" else 80))
    kept = [v.shape for v in jax.tree.leaves(jax.vjp(lambda x: getattr(bound, side)(params, x), x)[1])]
    assert kept and (96, 80) not in kept and (80, 96) not in kept
    dense = jax.vjp(lambda x: x @ (m := bound.materialize(params), m.T)[side == "rmatmul"], x)[1]
    assert {v.shape for v in jax.tree.leaves(dense)} & {(96, 80), (80, 96)}  # the check can fail


def test_cost_says_that_it_dequantises():
    bound = bind("quantized(4, group=8)", 24, 10)
    params, x = bound.init(jax.random.key(0)), jnp.ones((7, 24))
    for path in ("factored", "dense"):
        cost = bound.cost(7, path=path)
        assert cost.flops == 2 * 7 * 24 * 10
        assert cost.flops_executed == 24 * 10 + cost.flops == count_flops(bound.matmul, params, x)


# -- initialisation and training -------------------------------------------------------------------------------------


@every_grid
def test_init_has_the_size_of_a_dense_matrix_and_no_mean(bits, grid):
    n, m = 128, 400
    for mode, std in (("spectral", n**0.5 / n), ("variance", n**-0.5), ("paper", (3 * n) ** -0.5)):
        bound = bind(f"quantized({bits}, group=32, grid='{grid}', init='{mode}')", n, m)
        w = np.asarray(bound.materialize(bound.init(jax.random.key(1))))
        assert w.std() == pytest.approx(std, rel=0.02) and abs(w.mean()) < 0.06 * std
        assert len(np.unique(w)) > 2 ** (bits - 2)


def test_nothing_trains_unless_asked():
    trains = lambda text: map_leaves(lambda leaf: leaf.trainable, bind(text, 16, 6).leaves())
    assert trains("quantized(4, group=8)") == {"codes": False, "scales": False}
    assert trains("quantized(4, group=8, train=('scales',))") == {"codes": False, "scales": True}
    both = "quantized(4, group=8, symmetric=False, train=('scales', 'offsets'))"
    assert trains(both) == {"codes": False, "scales": True, "offsets": True}


# -- LQ-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("bits", "grid", "first"), [(2, "int", "quantized"), (4, "normal", "low_rank")])
def test_quantised_plus_low_rank_is_nearer_than_one_pass(bits, grid, first):
    """LQ-LoRA's loop: below plain quantisation and below its greedy start; no worse than `like`."""
    w = normal(10, 64, 48) * np.linspace(0.2, 3, 48, dtype=np.float32) + normal(11, 64, 4) @ normal(12, 4, 48)
    terms, size = [f"quantized({bits}, group=16, grid='{grid}')", "low_rank(rank=8)"], np.linalg.norm
    plain = nearest(terms[0], w)
    terms = terms if first == "quantized" else terms[::-1]
    start = nearest(terms[0], w)
    params, found = projector(" + ".join(terms), 64, 48)(w)
    assert size(w - found) < (0.6 if first == "low_rank" else 0.9) * size(w - plain)
    assert size(w - found) < 0.97 * size(w - start - nearest(terms[1], w - start))
    codes = next(p["codes"] for p in params.values() if "codes" in p)
    assert codes.dtype == np.uint8
    _, again = projector(" + ".join(terms), 64, 48)(w, like=params)
    assert size(w - again) <= size(w - found) * (1 + 1e-6)


@pytest.mark.long
def test_the_low_rank_term_of_a_quantised_matrix_is_nothing():
    w = nearest("quantized(2, group=16, grid='int')", normal(13, 64, 48))
    params, found = projector("quantized(2, group=16, grid='int') + low_rank(rank=8)", 64, 48)(w)
    np.testing.assert_allclose(found, w, atol=1e-5)
    assert np.abs(bind("low_rank(rank=8)", 64, 48).materialize(params["1"])).max() < 1e-5


def test_the_sum_starts_at_the_quantised_term_and_trains_the_other():
    bound = bind("quantized(4, group=16) + low_rank(rank=2)", 32, 24)
    params = bound.init(jax.random.key(0))
    np.testing.assert_array_equal(bound.materialize(params), bound.terms[0].materialize(params["0"]))
    flags = map_leaves(lambda leaf: leaf.trainable, bound.leaves())
    assert flags == {"0": {"codes": False, "scales": False}, "1": {"a": True, "b": True}}


# -- sizes and errors ------------------------------------------------------------------------------------------------


def test_fit_chooses_bits_or_group():
    chosen = lambda text: bind(text, 256, 64).structure
    assert [chosen(f"fit(quantized(), bits={b})").bits for b in (0.08, 0.11, 0.14, 0.26, 1.0)] == [2, 3, 4, 8, 8]
    assert chosen("fit(quantized(bits=4, group=None), bits=0.16)").group == 32  # 4 + 32 / 32 = 5 of 32 bits
    with pytest.raises(StructureError, match="whose smallest member"):
        bind("fit(quantized(), bits=0.07)", 256, 64)
    with pytest.raises(StructureError, match="bits or group, not both"):
        bind("fit(quantized(group=None), bits=0.2)", 256, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantized()", "needs bits"),
        ("quantized(4, group=None)", "needs group"),
        ("quantized(5)", "bits must be one of 2, 3, 4, 8, got 5"),
        ("quantized(4, group=0)", "group must be at least 1, got 0"),
        ("quantized(4, group=7)", r"group=7 does not fit a weight of shape \(24, 16\); nearest valid: .*6, 8"),
        ("quantized(4)", "group=128 does not fit .* nearest valid: .*12, 24"),
        ("quantized(4, group=12, axis='out')", "nearest valid: .*8, 16"),
        ("quantized(4, group=8, grid='nf')", "grid got 'nf'"),
        ("quantized(4, group=8, train=('scale',))", "did you mean 'scales'"),
    ],
)
def test_errors(text, message):
    with pytest.raises(StructureError, match=message):
        bind(text, 24, 16)


def test_complex_matrices_are_refused():
    with pytest.raises(StructureError, match="complex"):
        bind("quantized(4, group=8)", 24, 16).project(jnp.ones((24, 16), jnp.complex64))
