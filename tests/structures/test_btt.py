"""Block tensor train against the entry formula, reference values and TT-SVD's guarantee."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import StructureError
from structmat.structures.block_low_rank import BoundBlockLowRank
from structmat.structures.block_tensor_train import BlockTensorTrain

key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


INDEX = np.arange(64)
AR1 = 0.5 ** np.abs(INDEX[:, None] - INDEX)
HILBERT = 1 / (1 + INDEX[:, None] + INDEX)


def bind(rank, n, m=None, **kwargs):
    return BlockTensorTrain(rank, **kwargs).bind(n, m or n)


@functools.partial(jax.jit, static_argnums=0)
def relative_error(bound, w):
    return jnp.linalg.norm(w - bound.materialize(bound.project(w))) / jnp.linalg.norm(w)


def error(bound, w):
    return float(relative_error(bound, jnp.asarray(w)))


def by_entries(bound, params):
    """The matrix from the formula of the module, entry by entry."""
    ins, outs, ranks = bound.ins, bound.outs, bound.ranks
    cores = []
    for k in range(len(ins)):
        shape = (*outs[:k], *ins[:k:-1], ranks[k], ins[k], ranks[k + 1], outs[k])
        cores.append(np.asarray(params[f"core{k}"]).reshape(shape))
    w = np.zeros((bound.d_in, bound.d_out))
    places = itertools.product(*map(range, ins), *map(range, outs))
    for digits in places:
        i, j = digits[: len(ins)], digits[len(ins) :]
        row = int(np.ravel_multi_index(i[::-1], ins[::-1]))
        paper = bound.structure.order == "paper"
        column = np.ravel_multi_index(j[::-1] if paper else j, outs[::-1] if paper else outs)
        chain = np.ones((1, 1))
        for k, core in enumerate(cores):
            chain = chain @ core[(*j[:k], *i[:k:-1])][:, i[k], :, j[k]]
        w[row, int(column)] = chain[0, 0]
    return w


@pytest.mark.parametrize("order", ["paper", "blocked"])
@pytest.mark.parametrize(("n", "m", "cores"), [(12, 30, 3), (16, 24, 4)])
def test_matrix_is_the_entry_formula(n, m, cores, order):
    bound = bind(3, n, m, cores=cores, order=order)
    params = bound.init(key(0))
    np.testing.assert_allclose(jax.jit(bound.materialize)(params), by_entries(bound, params), atol=1e-5)


def test_two_cores_are_the_block_low_rank_class():
    bound = bind(2, 24, 36)
    assert isinstance(bound, BoundBlockLowRank)
    assert (bound.in_blocks, bound.out_blocks, bound.rank, bound.order) == (4, 6, 2, "paper")
    assert "4 x 6 slices of 6 x 6" in repr(bound)
    blocked = structmat.parse("block_low_rank(in_blocks=4, out_blocks=6, rank=2)").bind(24, 36)
    params = bound.init(key(0))
    same = bind(2, 24, 36, order="blocked").materialize(params)
    np.testing.assert_array_equal(same, blocked.materialize(params))


def test_three_cores_have_the_card_s_shapes():
    bound = bind(2, 8, 8, cores=3, order="blocked")
    shapes = {n: leaf.shape for n, leaf in bound.leaves().items()}
    assert shapes == {"core0": (1, 4, 2, 4), "core1": (2, 2, 4, 4), "core2": (4, 1, 4, 2)}


def test_rank_one_square_is_monarch():
    w = normal(1, 36, 36)
    monarch = structmat.parse("monarch(blocks=6)").bind(36, 36)
    btt = bind(1, 36)
    assert btt.params == monarch.params == 2 * 36 * 6
    params = monarch.project(w)
    np.testing.assert_array_equal(btt.materialize(params), monarch.materialize(params))
    np.testing.assert_array_equal(btt.materialize(btt.project(w)), monarch.materialize(params))


@pytest.mark.parametrize(
    ("w", "errors"),
    [(HILBERT, {1: 0.1000533045, 2: 0.0045329152}), (AR1, {1: 0.2418519276, 2: 0.0125052031, 4: 0.0})],
    ids=["hilbert", "ar1"],
)
def test_reference_errors(w, errors):
    with jax.enable_x64(True):
        for rank, expected in errors.items():
            assert error(bind(rank, 64), w) == pytest.approx(expected, abs=2e-10)


def test_low_rank_at_equal_parameters_is_worse_on_ar1():
    with jax.enable_x64(True):
        for rank, expected in ((1, 0.662), (2, 0.433)):
            low = structmat.parse(f"low_rank(rank={8 * rank})").bind(64, 64)
            assert low.params == bind(rank, 64).params
            assert error(low, AR1) == pytest.approx(expected, abs=6e-4)


def test_exactly_representable_classes():
    with jax.enable_x64(True):
        assert error(bind(8, 64), normal(2, 64, 64)) < 1e-12
        assert error(bind(4, 64, cores=3), normal(2, 64, 64)) < 1e-12
        low = normal(2, 24, 2) @ normal(2, 2, 36)
        assert error(bind(2, 24, 36), low) < 1e-12
        assert error(bind(2, 24, 36, cores=3), low) < 1e-12
        kron = jnp.kron(normal(2, 8, 8), normal(2, 8, 8))
        assert error(bind(1, 64), kron) < 1e-12


def test_kronecker_is_cores_constant_over_the_blocks():
    """Its slices are all multiples of one matrix: with paper order, W[(k, p), (s, l)] = A[k, s] B[p, l] reordered."""
    a, b = (normal(k, 4, 4) for k in (0, 1))
    r = jnp.broadcast_to(b[None, :, :, None], (4, 4, 4, 1))
    l = jnp.broadcast_to(a[None, :, None, :], (4, 4, 1, 4))
    np.testing.assert_allclose(bind(1, 16).materialize({"R": r, "L": l}), jnp.kron(a, b), atol=1e-6)


@pytest.mark.parametrize("order", ["paper", "blocked"])
def test_projection_is_quasi_optimal(order):
    """error^2 is at least that of the worst cut and at most the sum over the cuts of w's own discarded sigma^2."""
    with jax.enable_x64(True):
        w = normal(3, 24, 36)
        bound = bind(3, 24, 36, cores=3, order=order)
        blocked = bound._blocked(w)
        tails = []
        for k in (1, 2):
            shared, left = int(np.prod(bound.ins[k:])), int(np.prod(bound.ins[:k]))
            slices = blocked.reshape(shared, left, int(np.prod(bound.outs[:k])), -1).transpose(0, 2, 1, 3)
            tails.append(float(jnp.sum(jnp.linalg.svd(slices, compute_uv=False)[..., bound.ranks[k] :] ** 2)))
        found = error(bound, w) ** 2 * float(jnp.sum(w**2))
        assert max(tails) * (1 - 1e-12) <= found <= sum(tails) * (1 + 1e-12)
        assert not bound.exact


def test_members_and_zero_come_back_balanced():
    with jax.enable_x64(True):
        bound = bind(2, 24, 36, cores=3)
        w = bound.materialize(bound.init(key(4), jnp.float64))
        assert error(bound, w) < 1e-12
        project = jax.jit(bound.project)
        norms = [float(jnp.linalg.norm(c)) for c in project(w).values()]
        assert max(norms) / min(norms) < 1 + 1e-9
        zero = project(jnp.zeros((24, 36)))
        assert not np.any(bound.materialize(zero)) and all(np.all(np.isfinite(c)) for c in zero.values())


@pytest.mark.long
def test_like_is_kept_where_it_is_better():
    with jax.enable_x64(True):
        bound = bind(1, 8, 8, cores=3)
        w = normal(7, 8, 8)
        loss = jax.jit(lambda p: jnp.sum((w - bound.materialize(p)) ** 2))
        project = jax.jit(lambda like: bound.project(w, like=like))
        first = bound.project(w)
        step = lambda p, _: (jax.tree.map(lambda v, g: v - 0.01 * g, p, jax.grad(loss)(p)), None)
        better = jax.jit(lambda p: jax.lax.scan(step, p, length=200)[0])(first)
        assert loss(better) < 0.999 * loss(first)
        assert loss(project(better)) == pytest.approx(float(loss(better)))
        assert loss(project(bound.init(key(0), jnp.float64))) == pytest.approx(float(loss(first)))


def test_diagonal_grams_weigh_the_error():
    with jax.enable_x64(True):
        bound = bind(2, 24, 36, cores=3)
        w = normal(5, 24, 36)
        rng = np.random.default_rng(0)
        a, b = jnp.asarray(rng.uniform(0.01, 10, 24)), jnp.asarray(rng.uniform(0.01, 10, 36))
        project = jax.jit(lambda w, a, b: bound.materialize(bound.project(w, in_gram=a, out_gram=b)))
        weighted = lambda found: float(np.sum((w - found) ** 2 * a[:, None] * b))
        best = weighted(project(w, a, b))
        assert best < 0.9 * weighted(project(w, None, None))
        whitened = w * jnp.sqrt(a)[:, None] * jnp.sqrt(b)
        plain = project(whitened, None, None) - whitened
        assert best == pytest.approx(float(jnp.sum(plain**2)))
        with pytest.raises(StructureError, match="full in_gram"):
            bound.project(w, in_gram=jnp.eye(24))


def test_fans_and_counts():
    bound = bind(3, 64, cores=3)
    leaves = bound.leaves("embed", "mlp")
    assert [(leaf.fan_in, leaf.fan_out, leaf.share, leaf.embed_fan) for leaf in leaves.values()] == [
        (4, 12, 3, 1),
        (12, 12, 3, 3),
        (12, 4, 3, 3),
    ]
    assert bound.cost(7).flops == 2 * 7 * bound.params
    two = bind(4, 256)
    assert two.params == 2 * 4 * 256**1.5 and two.cost(1).flops == 2 * two.params


def test_sizes_and_arguments():
    prime = bind(1, 7, 12)
    assert (prime.in_blocks, prime.out_blocks) == (1, 3)
    with pytest.raises(StructureError, match=r"nearest valid: .*8"):
        bind(9, 64)
    with pytest.raises(StructureError, match="in size=14 has 2 prime factors"):
        bind(1, 14, 16, cores=3)
    with pytest.raises(StructureError, match="cores must be at least 2, got 1"):
        bind(1, 16, cores=1)
    with pytest.raises(StructureError, match="needs rank"):
        bind(None, 16)
    with pytest.raises(StructureError, match="did you mean 'paper'"):
        structmat.parse("block_tensor_train(rank=1, order='papr')")
    with pytest.raises(StructureError, match="expected"):
        bind(1, 16).project(jnp.zeros((16, 4)))


@pytest.mark.parametrize("cores", [2, 3])
def test_fit_takes_the_largest_rank_within_the_budget(cores):
    free = structmat.parse(f"block_tensor_train(cores={cores})")
    costs = [c.bind(64, 64).params for c in free.candidates((64,), (64,))]
    assert costs == sorted(set(costs))
    chosen = structmat.parse(f"fit(block_tensor_train(cores={cores}), params=0.6)").bind(64, 64)
    assert chosen.params == max(c for c in costs if c <= 0.6 * 64 * 64)
