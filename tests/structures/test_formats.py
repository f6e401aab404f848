"""N-d formats on their own: contraction, initialisation, rank rules, and projection against tensorly."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorly
from tensorly.cp_tensor import validate_cp_rank
from tensorly.decomposition import parafac, tensor_ring, tensor_ring_als, tucker
from tensorly.tr_tensor import validate_tr_rank
from tensorly.tt_tensor import validate_tt_rank
from tensorly.tucker_tensor import validate_tucker_rank

from structmat import StructureError
from structmat.structures import alternating
from structmat.structures.alternating import least_squares
from structmat.structures.cp_format import CPFormat
from structmat.structures.tensor import TensorTrainFormat
from structmat.structures.tensor_ring_format import TensorRingFormat
from structmat.structures.tucker_format import TuckerFormat, cheapest_order, proportional_ranks, reduction_flops
from tests.structures.flops import count_flops

FORMATS = [TensorTrainFormat, TuckerFormat, CPFormat, TensorRingFormat]
ITERATIVE = [TuckerFormat, CPFormat, TensorRingFormat]
every = pytest.mark.parametrize("kind", FORMATS, ids=lambda k: k.__name__)
iterative = pytest.mark.parametrize("kind", ITERATIVE, ids=lambda k: k.__name__)


def normal(rng, shape, dtype=np.float64):
    real = rng.normal(size=shape)
    return (real + 1j * rng.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else real).astype(dtype)


def cores_of(form, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [normal(rng, s, dtype) for s in form.core_shapes]


def independent(form, cores):
    """The tensor as tensorly or numpy multiplies it out."""
    if isinstance(form, TuckerFormat):
        return tensorly.tucker_to_tensor((cores[0], cores[1:]))
    if isinstance(form, CPFormat):
        return tensorly.cp_to_tensor((np.ones(form.rank), cores))
    chain = functools.reduce(lambda a, b: np.tensordot(a, b, 1), cores)
    return np.trace(chain, axis1=0, axis2=-1)


def relative(form, cores, tensor):
    return float(np.linalg.norm(tensor - np.asarray(form.materialize(cores))) / np.linalg.norm(tensor))


# -- contraction and materialisation -------------------------------------------------------------------------------------


@pytest.mark.long
@every
@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 5, 4), (2, 3, 4, 3)], ids=str)
def test_contract_and_materialize(kind, shape):
    """For 1 to 4 axes, real and complex: the tensor is tensorly's, `contract` is einsum with it, axes kept, summed and
    shared; the FLOPs of `materialize` are those traced."""
    form = kind.of(shape, 1 if len(shape) == 1 else 2)
    tensor_axes = "ijkl"[: len(shape)]
    cases = [
        (f"b{tensor_axes[0]},{tensor_axes}->b{tensor_axes[1:]}", (6, shape[0])),
        (f"b{tensor_axes},{tensor_axes}->b", (6, *shape)),
        (f"b{tensor_axes[-1]},{tensor_axes}->{tensor_axes}b", (6, shape[-1])),
    ]
    for dtype in (np.float32, np.complex64):
        cores = cores_of(form, dtype=dtype)
        dense = independent(form, cores)
        assert dense.shape == form.shape == shape
        np.testing.assert_allclose(jax.jit(form.materialize)(cores), dense, atol=1e-5 * np.abs(dense).max())
        for subscripts, x_shape in cases:
            x = normal(np.random.default_rng(1), x_shape, dtype)
            expected = np.einsum(subscripts, x, dense)
            got = form.contract(cores, x, subscripts)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert form.materialize_flops() == count_flops(form.materialize, cores)
    assert form.size == sum(c.size for c in cores)


@every
def test_contract_takes_the_cheapest_order(kind):
    """A spectral weight (cin, cout, k1, k2): few samples go core by core, many form the tensor first."""
    form = kind.of((16, 16, 6, 5), 4)
    cores = cores_of(form)
    flops = lambda batch: count_flops(
        lambda c, x: form.contract(c, x, "bikl,iokl->bokl"), cores, jnp.ones((batch, 16, 6, 5))
    )
    dense_first = lambda batch: form.materialize_flops() + 2 * batch * 16 * 16 * 6 * 5
    assert flops(1) < 0.8 * dense_first(1)
    assert flops(512) <= dense_first(512)
    if kind is TensorRingFormat:  # its chains cost more per sample than the dense product
        assert flops(512) > 0.95 * 2 * 512 * 16 * 16 * 6 * 5


def test_contract_refuses():
    for kind in FORMATS:
        with pytest.raises(StructureError, match="must read 'x,tensor->out'"):
            kind.of((3, 4, 5), 2).contract([], jnp.ones((2, 3)), "bi,ijk")
        with pytest.raises(StructureError, match=r"'ij' names 2 axes of a tensor of shape \(3, 4, 5\)"):
            kind.of((3, 4, 5), 2).contract([], jnp.ones((2, 3)), "bi,ij->bj")


def test_a_ring_turns():
    """Moving a core from the front to the end moves its axis; with closing rank 1 a ring is a train."""
    form = TensorRingFormat(((3,), (4,), (5,)), (2, 3, 4))
    cores = cores_of(form)
    turned = TensorRingFormat(((4,), (5,), (3,)), (3, 4, 2))
    moved = np.moveaxis(np.asarray(form.materialize(cores)), 0, -1)
    np.testing.assert_allclose(turned.materialize([*cores[1:], cores[0]]), moved, atol=1e-4)
    train = TensorTrainFormat.of((3, 4, 5), 2)
    ring = TensorRingFormat(train.modes, (1, *train.ranks))
    cores = cores_of(train)
    np.testing.assert_allclose(ring.materialize(cores), train.materialize(cores), atol=1e-5)


def test_cheapest_order_is_the_best_permutation():
    """Against all orders of contraction, also with axes that are not reduced."""

    def flops(order, axes, ranks):
        total, size = 0, math.prod(axes)
        for k in order:
            total += 2 * size * ranks[k]
            size = size // axes[k] * ranks[k]
        return total

    rng = np.random.default_rng(0)
    for _ in range(40):
        axes = tuple(int(n) for n in rng.integers(1, 9, size=4))
        ranks = tuple(int(rng.integers(1, n + 1)) for n in axes)
        best = min(flops(order, axes, ranks) for order in itertools.permutations(range(4)))
        assert reduction_flops(axes, ranks) == flops(cheapest_order(axes, ranks), axes, ranks) == best


# -- initialisation and ranks --------------------------------------------------------------------------------------------


@pytest.mark.long
@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64], ids=["real", "complex"])
def test_init_reaches_the_stated_std(kind, dtype):
    """Within 10 % of std 0.3; the rule of tensorly-torch misses it 23-fold for a tensor train of rank 8."""
    form = kind.of((8, 9, 10, 8), 8)
    draw = jax.jit(jax.vmap(lambda key: form.materialize(form.init(key, std=0.3, dtype=dtype))))
    tensors = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert tensors.dtype == dtype and tensors.shape[1:] == (8, 9, 10, 8)
    assert np.sqrt(np.mean(np.abs(tensors) ** 2)) == pytest.approx(0.3, rel=0.1)
    assert [c.shape for c in form.init(jax.random.key(0))] == form.core_shapes


@every
@pytest.mark.parametrize("fraction", [0.02, 0.1])
def test_fractions_are_those_of_tensorly(kind, fraction):
    rule = {
        TensorTrainFormat: lambda s, f: tuple(validate_tt_rank(s, f)[1:-1]),
        TuckerFormat: lambda s, f: tuple(validate_tucker_rank(s, f)),
        CPFormat: validate_cp_rank,
        TensorRingFormat: lambda s, f: tuple(validate_tr_rank(s, f)[:-1]),
    }[kind]
    for shape in ((16, 16, 12, 7), (32, 24, 20)):
        form = kind.of_fraction(shape, fraction)
        assert (form.rank if kind is CPFormat else form.ranks) == rule(shape, fraction)
        assert form.size == pytest.approx(fraction * math.prod(shape), rel=0.25)  # ranks are whole numbers
    assert kind.of_fraction((6, 5, 4), 50.0).size >= 120  # all of it
    with pytest.raises(StructureError, match="fraction must be positive, got 0"):
        kind.of_fraction((6, 5, 4), 0)


def test_counts_in_closed_form():
    assert TensorRingFormat.of((4, 5, 6), 3).size == 9 * (4 + 5 + 6)
    assert TensorRingFormat(((4,), (5,), (6,)), (2, 3, 4)).size == 2 * 4 * 3 + 3 * 5 * 4 + 4 * 6 * 2
    assert TuckerFormat.of((4, 5, 6), (2, 3, 4)).size == 24 + 8 + 15 + 24
    assert CPFormat.of((4, 5, 6), 7).size == 7 * 15


def test_tucker_ranks_are_clipped_to_what_is_useful():
    assert TuckerFormat.of((64, 3, 3, 64), 8).ranks == (8, 3, 3, 8)
    assert TuckerFormat.of((100, 2, 2), 50).ranks == (4, 2, 2)  # a core of 4 x 2 x 2 holds every tensor
    assert TuckerFormat.of((7,), 3).ranks == (1,)
    members = proportional_ranks((9, 4, 2))
    assert members[0] == (1, 1, 1) and members[-1] == (8, 4, 2)
    assert all(all(a <= b for a, b in zip(*pair)) and pair[0] != pair[1] for pair in itertools.pairwise(members))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TuckerFormat((4, 5, 6), (5, 5, 5)), r"ranks \(5, 5, 5\) do not fit axes \(4, 5, 6\).*nearest valid: \(4, 5, 5\)"),
        (lambda: TuckerFormat((4, 5, 6), (1, 1, 2)), r"nearest valid: \(1, 1, 1\)"),
        (lambda: TuckerFormat((4, 5, 6), (0, 1, 2)), "do not fit"),
        (lambda: TuckerFormat((4, 5, 6), (2, 2)), "2 ranks"),
        (lambda: CPFormat((4, 5, 6), 21), r"rank is 21, must be in 1\.\.20 for axes \(4, 5, 6\)"),
        (lambda: CPFormat((4, 5, 6), 0), "rank is 0"),
        (lambda: TensorRingFormat(((4,), (5,)), (2,)), "as many ranks"),
        (lambda: TensorRingFormat(((2,), (5,), (3,)), (1, 3, 2)), r"rank 1 is 3, must be in 1\.\.2"),
        (lambda: TensorRingFormat(((2,),), (2,)), r"rank 0 is 2, must be in 1\.\.1"),
    ],
)  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(StructureError, match=message):
        make()


# -- projection ----------------------------------------------------------------------------------------------------------


def low_rank_plus_noise(rng, shape, rank=3, noise=0.01):
    factors = [rng.normal(size=(n, rank)) for n in shape]
    tensor = tensorly.cp_to_tensor((None, factors))
    tensor /= np.linalg.norm(tensor)
    return tensor + noise * rng.normal(size=shape) / math.sqrt(math.prod(shape))


def tensors(shape):
    rng = np.random.default_rng(11)
    smooth = 1 / (1 + sum(np.ogrid[tuple(slice(n) for n in shape)]))
    return {"random": rng.normal(size=shape), "smooth": smooth, "noisy": low_rank_plus_noise(rng, shape)}


def tensorlys_best(form, tensor):
    """The least error of tensorly's algorithms: HOOI; CP-ALS from singular vectors and two random starts; TR-SVD where it
    exists and TR-ALS from three random starts."""
    run = {"n_iter_max": 200, "tol": 1e-9}
    if isinstance(form, TuckerFormat):
        found = [tensorly.tucker_to_tensor(tucker(tensor, list(form.ranks), **run))]
    elif isinstance(form, CPFormat):
        starts = [("svd", 0), ("random", 0), ("random", 1)]
        cp = [parafac(tensor, form.rank, init=init, random_state=seed, **run) for init, seed in starts]
        found = [tensorly.cp_to_tensor(c) for c in cp]
    else:
        rank = [*form.ranks, form.ranks[0]]
        rings = [tensor_ring_als(tensor, rank, random_state=seed, **run) for seed in range(3)]
        if rank[0] * rank[1] <= tensor.shape[0]:
            rings.append(tensor_ring(tensor, list(rank)))
        found = [tensorly.tr_to_tensor(r) for r in rings]
    return min(float(np.linalg.norm(tensor - f) / np.linalg.norm(tensor)) for f in found)


@pytest.mark.long
@iterative
@pytest.mark.parametrize(("shape", "rank"), [((5, 6, 4), 2), ((4, 3, 4, 5), 3)], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_no_worse_than_tensorly(kind, shape, rank):
    """On random, smooth and noisy low-rank tensors; in f32 within a little of that."""
    form = kind.of(shape, rank)
    for name, tensor in tensors(shape).items():
        with jax.enable_x64(True):
            ours = relative(form, form.project(jnp.asarray(tensor)), tensor)
        assert ours <= tensorlys_best(form, tensor) * (1 + 1e-5), name


@pytest.mark.long
@iterative
def test_single_precision_finds_the_same(kind):
    for name, tensor in tensors((5, 6, 4)).items():
        form = kind.of(tensor.shape, 2)
        with jax.enable_x64(True):
            double = relative(form, form.project(jnp.asarray(tensor)), tensor)
        cores = form.project(jnp.asarray(tensor, jnp.float32))
        assert {c.dtype for c in cores} == {jnp.dtype("float32")}
        assert relative(form, cores, tensor) <= double * 1.01 + 1e-6, name


@iterative
@pytest.mark.parametrize(
    "dtype", [np.float64, pytest.param(np.complex128, marks=pytest.mark.long)], ids=["real", "complex"]
)
def test_members_are_recovered(kind, dtype):
    """To rounding, from the tensor alone."""
    form = kind.of((5, 6, 4), 2)
    with jax.enable_x64(True):
        member = np.asarray(form.materialize(cores_of(form, seed=3, dtype=dtype)))
        cores = form.project(jnp.asarray(member))
        assert {c.dtype for c in cores} == {np.dtype(dtype)}
        assert relative(form, cores, member) < 1e-7


@pytest.mark.long
@every
def test_everything_is_recovered_at_full_rank(kind):
    """And a tensor of zeros is zeros, not NaN."""
    tensor = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    form = kind.of(tensor.shape, {CPFormat: 6, TensorRingFormat: 3}.get(kind, 8))
    assert relative(form, form.project(jnp.asarray(tensor)), tensor) < 1e-3
    zero = form.project(jnp.zeros_like(tensor))
    assert all(np.all(np.isfinite(c)) for c in zero) and not np.any(form.materialize(zero))


@iterative
@pytest.mark.parametrize("shape", [(7,), (5, 6)], ids=str)
def test_up_to_two_axes_are_exact(kind, shape):
    """One axis is the vector itself; two are a truncated SVD, of rank r^2 for a ring."""
    tensor = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    form = kind.of(shape, min(len(shape), 2))
    kept = {1: 1, 2: 4 if kind is TensorRingFormat else 2}[len(shape)]
    tail = np.linalg.svd(tensor.reshape(shape[0], -1), compute_uv=False)[kept:]
    error = np.linalg.norm(tensor - np.asarray(form.materialize(form.project(jnp.asarray(tensor)))))
    assert error == pytest.approx(np.linalg.norm(tail), rel=1e-4, abs=1e-5)


def test_least_squares_keeps_its_accuracy():
    """Condition 300 in f32: 1e-5, where the normal equations alone leave 1e-3; dependent rows give the least norm."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(40, 6)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    design = (v * np.logspace(0, -2.5, 6)) @ u.T
    x = rng.normal(size=(3, 6))
    found = least_squares(jnp.asarray(design, jnp.float32), jnp.asarray(x @ design, jnp.float32))
    assert np.linalg.norm(found - x) < 1e-5 * np.linalg.norm(x)
    twice = np.concatenate([u.T[:2], u.T[:2]]).astype(np.float32)
    np.testing.assert_allclose(least_squares(twice, u.T[:1].astype(np.float32)), [[0.5, 0, 0.5, 0]], atol=1e-5)


@pytest.mark.long
@iterative
def test_never_worse_than_like(kind):
    tensor = np.random.default_rng(2).normal(size=(5, 6, 4)).astype(np.float32)
    form = kind.of(tensor.shape, 2)
    alone = form.project(jnp.asarray(tensor))
    for like in (alone, cores_of(form, seed=5), [c * 1.01 for c in alone]):
        found = form.project(jnp.asarray(tensor), like=like)
        assert relative(form, found, tensor) <= relative(form, like, tensor) * (1 + 1e-6)


@pytest.mark.long
@iterative
def test_like_is_a_start(kind, monkeypatch):
    """Cut short, one run leads less far than a second run from its result."""
    monkeypatch.setattr(alternating, "effort", lambda size: (1, 2))
    monkeypatch.setattr(alternating, "_TRIAL", 2)
    tensor = np.random.default_rng(8).normal(size=(7, 5, 6))
    form = kind.of(tensor.shape, 3)
    with jax.enable_x64(True):
        once = form.project(jnp.asarray(tensor))
        twice = form.project(jnp.asarray(tensor), like=once)
        assert relative(form, twice, tensor) < (1 - 1e-4) * relative(form, once, tensor)


def test_hooi_is_orthogonal_and_within_its_bounds():
    """U_k orthonormal; |t|^2 = error^2 + |core|^2; no worse than HOSVD's bound, no better than any unfolding's tail."""
    tensor = np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    form = TuckerFormat.of(tensor.shape, 2)
    core, *factors = form.project(jnp.asarray(tensor))
    for u in factors:
        np.testing.assert_allclose(u.T @ u, np.eye(2), atol=1e-5)
    error = np.linalg.norm(tensor - np.asarray(form.materialize([core, *factors])))
    assert error**2 + np.linalg.norm(core) ** 2 == pytest.approx(np.linalg.norm(tensor) ** 2, rel=1e-5)
    tails = []
    for k in range(3):
        unfolded = np.moveaxis(tensor, k, 0).reshape(tensor.shape[k], -1)
        tails.append(np.sum(np.linalg.svd(unfolded, compute_uv=False)[2:] ** 2))
    assert math.sqrt(max(tails)) * (1 - 1e-5) <= error <= math.sqrt(sum(tails)) * (1 + 1e-5)


def test_cp_terms_are_ordered_balanced_and_signed():
    tensor = np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    factors = [np.asarray(f) for f in CPFormat.of(tensor.shape, 4).project(jnp.asarray(tensor))]
    sizes = np.array([np.linalg.norm(f, axis=0) for f in factors])
    np.testing.assert_allclose(sizes, np.broadcast_to(sizes[0], sizes.shape), rtol=1e-4)
    assert np.all(np.diff(sizes[0]) <= 1e-6)
    for f in factors[:-1]:
        assert np.all(f[np.abs(f).argmax(0), np.arange(4)] > 0)
    again = CPFormat.of(tensor.shape, 4).project(jnp.asarray(tensor))
    jax.tree.map(np.testing.assert_array_equal, list(again), factors)


def test_ring_cores_share_one_norm():
    tensor = 1e4 * np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    sizes = [np.linalg.norm(c) for c in TensorRingFormat.of(tensor.shape, 2).project(jnp.asarray(tensor))]
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-4)


@pytest.mark.long
@iterative
def test_a_stack_is_projected_as_one_by_one(kind):
    stack = np.random.default_rng(6).normal(size=(2, 5, 6, 4)).astype(np.float32)
    form = kind.of(stack.shape[1:], 2)
    together = jax.jit(jax.vmap(form.project))(stack)
    for i, tensor in enumerate(stack):
        one = relative(form, form.project(jnp.asarray(tensor)), tensor)
        assert relative(form, [c[i] for c in together], tensor) == pytest.approx(one, rel=1e-3)
