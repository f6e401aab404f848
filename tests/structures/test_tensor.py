"""The N-d core on its own, and how sizes split into factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import StructureError
from structmat.structures.factors import count_primes, divisors, even_factors
from structmat.structures.tensor import TensorTrainFormat, maximal_ranks

SHAPES = [((4, 5, 6), 3), (((2, 3), (4, 5)), 4), ((7,), 1), ((2, 3, 2, 3, 2), 2)]


@pytest.mark.long
@pytest.mark.parametrize(("modes", "rank"), SHAPES, ids=str)
def test_init_has_the_stated_entries(modes, rank):
    """The entries' standard deviation is `std`: the cores' carry the root of the product of ranks."""
    form = TensorTrainFormat.of(modes, rank)
    keys = jax.random.split(jax.random.key(0), 600)
    draw = jax.jit(jax.vmap(lambda key: form.materialize(form.init(key, std=0.3))))
    tensors = np.asarray(draw(keys))
    assert tensors.shape[1:] == form.shape
    power = (tensors**2).mean(axis=tuple(range(1, tensors.ndim)))
    assert abs(power.mean() - 0.09) < 5 * power.std() / np.sqrt(600)
    assert [c.shape for c in form.init(keys[0])] == form.core_shapes


@pytest.mark.parametrize(
    "subscripts", ["xij,ijkl->xkl", "ijkl,ijkl->", "xk,ijkl->xijl", "xik,ijkl->xikjl", "xlk,ijkl->jxi", "x,ijkl->xkjil"]
)
def test_contract_is_einsum_with_the_tensor(subscripts):
    """Summed, kept and mode axes alike."""
    form = TensorTrainFormat.of((2, 3, 4, 5), 3)
    rng = np.random.default_rng(0)
    cores = [rng.normal(size=s).astype(np.float32) for s in form.core_shapes]
    sizes = dict(zip("ijklx", (2, 3, 4, 5, 6)))
    x = rng.normal(size=[sizes[c] for c in subscripts.split(",")[0]]).astype(np.float32)
    expected = np.einsum(subscripts, x, form.materialize(cores))
    np.testing.assert_allclose(form.contract(cores, x, subscripts), expected, atol=1e-4)


@pytest.mark.parametrize("subscripts", ["xij->x", "xij,ij,k->x", "x...,ijkl->x", "xij,ijkl"])
def test_contract_refuses(subscripts):
    form = TensorTrainFormat.of((2, 3, 4, 5), 3)
    with pytest.raises(StructureError, match="must read 'x,tensor->out'"):
        form.contract([], jnp.ones((1, 2, 3)), subscripts)
    with pytest.raises(StructureError, match="'ijk' names 3 axes of a tensor of shape"):
        form.contract([], jnp.ones((1, 2, 3)), "xij,ijk->x")


def test_ranks_are_checked():
    assert maximal_ranks(((2,), (3,), (4,), (5,))) == (2, 6, 5)
    assert TensorTrainFormat.of((2, 3, 4, 5), 4).ranks == (2, 4, 4)
    with pytest.raises(StructureError, match=r"rank 1 is 7, must be in 1\.\.6"):
        TensorTrainFormat(((2,), (3,), (4,), (5,)), (2, 7, 5))
    with pytest.raises(StructureError, match="3 interior ranks"):
        TensorTrainFormat(((2,), (3,), (4,), (5,)), (2, 6))


def test_full_ranks_hold_every_tensor():
    tensor = np.random.default_rng(0).normal(size=(3, 4, 2, 3)).astype(np.float32)
    form = TensorTrainFormat.of(tensor.shape, 100)
    np.testing.assert_allclose(form.materialize(form.project(jnp.asarray(tensor))), tensor, atol=1e-5)


def test_projection_of_zero_is_zero():
    form = TensorTrainFormat.of((3, 4, 5), 2)
    assert all(np.all(np.isfinite(c)) and not np.any(c) for c in form.project(jnp.zeros((3, 4, 5))))


def test_projection_balances_the_cores():
    """Two cores share each singular value as its square root; an ill-scaled tensor does not land in one core."""
    cores = TensorTrainFormat.of((6, 7), 3).project(jnp.asarray(np.random.default_rng(0).normal(size=(6, 7)) * 1e4))
    first, second = np.asarray(cores[0]).reshape(6, 3), np.asarray(cores[1]).reshape(3, 7)
    np.testing.assert_allclose(first.T @ first, second @ second.T, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize(
    ("n", "count", "expected"),
    [(1024, 2, (32, 32)), (768, 2, (32, 24)), (128, 2, (16, 8)), (360, 3, (8, 9, 5)), (16, 4, (2, 2, 2, 2)), (7, 1, (7,)),
     (35, 3, None), (1, 1, None), (2 * 509, 2, (509, 2))],
)  # fmt: skip
def test_even_factors(n, count, expected):
    assert even_factors(n, count) == (expected and tuple(sorted(expected, reverse=True)))


def test_divisors_and_primes():
    for n in (1, 2, 12, 97, 360):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    assert [count_primes(n) for n in (1, 2, 12, 97, 360)] == [0, 1, 3, 1, 6]


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("tensor_train(rank=2)", (7, 12), "tensor_train: d_in=7 has 1 prime factors and cannot be split into 2; nearest sizes that work: 4, 6, 8, 9, 10"),
        ("tensor_train(rank=2, cores=3)", (24, 35), "d_out=35 has 2 prime factors"),
        ("tensor_train(rank=40)", (24, 36), "tensor_train: rank=40 does not fit a weight of shape (24, 36)"),
        ("tensor_train()", (24, 36), "tensor_train needs rank=..."),
        ("kronecker()", (13, 12), "kronecker: d_in=13 has 1 prime factors"),
        ("kronecker(in_factors=(5, 5))", (24, 36), "in_factors=(5, 5) multiply to 25, not d_in=24; nearest valid: (4, 6)"),
        ("kronecker(terms=25)", (24, 36), "kronecker: terms=25 does not fit"),
        ("diagonal()", (24, 36), "diagonal: needs a square weight, got (24, 36)"),
        ("block_diagonal(blocks=5)", (24, 36), "block_diagonal: blocks=5 does not fit a weight of shape (24, 36); nearest valid: 1, 2, 3, 4, 6, 12"),
        ("block_diagonal()", (24, 36), "block_diagonal needs blocks=..."),
        ("spectral(rank=25)", (24, 36), "spectral: rank=25 does not fit"),
        ("low_rank()", (24, 36), "low_rank needs rank=...; set it, or let fit(low_rank(...), params=0.25) choose it"),
        ("monarch(blocks=5)", (24, 36), "monarch: blocks=5 does not fit"),
        ("low_rank(rank=2)", (0, 36), "low_rank: in_shape must be a positive int or a tuple of them, got 0"),
        ("low_rank(rank=2)", (24, ()), "low_rank: out_shape must be a positive int"),
        ("dense() @ dense()", (24, 36), "neither dense() nor dense() fixes the inner size; write product(dense(), dense(), inner=64)"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(text, sizes, message):
    with pytest.raises(StructureError) as error:
        structmat.parse(text).bind(*sizes)
    assert message in str(error.value)


def test_spectral_scales_where_it_trains():
    """A gain of 0 starts at the zero matrix and leaves a gradient."""
    for text, zero in (("spectral(rank=2)", "s"), ("spectral(rank=2, train=('v',))", "v"), ("spectral(rank=2, train=('u', 'v'))", "v")):  # fmt: skip
        bound = structmat.parse(text).bind(6, 8)
        params = bound.init(jax.random.key(0), gain=0.0)
        grads = jax.grad(
            lambda p, bound=bound: jnp.sum(jnp.sin(jnp.arange(48.0)).reshape(6, 8) * bound.materialize(p))
        )(params)
        assert not np.any(params[zero]) and np.any(grads[zero])
