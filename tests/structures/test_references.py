"""Families against numpy, scipy and tensorly, which share no code with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import tensorly
from tensorly.decomposition import tensor_train as tensorly_train

import structmat
from structmat.structures.tensor import TensorTrainFormat
from tests.marks import mostly_long, thinned

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def drawn(text, d_in, d_out):
    """A Matrix with normal entries in every leaf."""
    bound = structmat.parse(text).bind(d_in, d_out)
    shapes = jax.eval_shape(bound.init, jax.random.key(0))
    return structmat.Matrix(bound, jax.tree.map(lambda s: jnp.asarray(normal(*s.shape)), shapes))


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_kronecker_is_numpys_kron():
    m = drawn("kronecker(terms=3, in_factors=(4, 6), out_factors=(3, 5))", 24, 15)
    a, b = m.params["a"], m.params["b"]
    same(m.materialize(), sum(np.kron(a[t], b[t]) for t in range(3)))


def test_kronecker_identities():
    """(A kron B)(C kron D) = AC kron BD; singular values multiply; trace and determinant factor."""
    first, second = (drawn("kronecker(in_factors=(3, 4), out_factors=(3, 4))", 12, 12) for _ in range(2))
    a, b = (first.params[n][0] @ second.params[n][0] for n in "ab")
    same(first.materialize() @ second.materialize(), np.kron(a, b))
    a, b = first.params["a"][0], first.params["b"][0]
    singular = [np.linalg.svd(m, compute_uv=False) for m in (first.materialize(), a, b)]
    same(singular[0], np.sort(np.outer(singular[1], singular[2]).ravel())[::-1])
    same(np.trace(first.materialize()), np.trace(a) * np.trace(b))
    same(np.linalg.det(first.materialize()), np.linalg.det(a) ** 4 * np.linalg.det(b) ** 3)


def test_kronecker_error_is_the_tail_of_the_rearranged_matrix():
    """Van Loan and Pitsianis, with the rearrangement built entry by entry."""
    w = normal(24, 15)
    rearranged = np.zeros((4 * 3, 6 * 5))
    for i in range(24):
        for j in range(15):
            rearranged[(i // 6) * 3 + j // 5, (i % 6) * 5 + j % 5] = w[i, j]
    singular = np.linalg.svd(rearranged, compute_uv=False)
    for terms in (1, 3, 7):
        m = structmat.project(w, f"kronecker(terms={terms}, in_factors=(4, 6), out_factors=(3, 5))")
        assert np.linalg.norm(w - m.materialize()) == pytest.approx(np.linalg.norm(singular[terms:]), rel=1e-5)
        norms = [np.linalg.norm(m.params[n], axis=(1, 2)) for n in "ab"]
        same(*norms)


def test_block_diagonal_is_scipys():
    m = drawn("block_diagonal(blocks=4)", 12, 20)
    same(m.materialize(), scipy.linalg.block_diag(*m.params["blocks"]))
    w = normal(12, 20)
    kept = scipy.linalg.block_diag(*np.ones((4, 3, 5))) * w
    same(structmat.project(w, "block_diagonal(blocks=4)").materialize(), kept)


def test_diagonal_is_numpys():
    w = normal(9, 9)
    same(drawn("diagonal()", 9, 9).materialize() * (1 - np.eye(9)), 0)
    same(structmat.project(w, "diagonal()").materialize(), np.diag(np.diag(w)))


@pytest.mark.parametrize("text", ["low_rank(rank=5)", "spectral(rank=5)"])
def test_low_rank_error_is_the_tail_of_the_svd(text):
    w = normal(18, 12)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    m = structmat.project(w, text)
    same(m.materialize(), (u[:, :5] * s[:5]) @ vt[:5])
    assert np.linalg.norm(w - m.materialize()) == pytest.approx(np.linalg.norm(s[5:]), rel=1e-5)
    if "s" in m.params:
        same(m.params["s"], s[:5])


def test_monarch_is_two_block_diagonals_around_a_permutation():
    """M = P L P^T R (Dao et al. 2022), as the transpose in this project's row-vector convention."""
    m = drawn("monarch(blocks=4)", 16, 16)
    right = scipy.linalg.block_diag(*(m.params["R"][k, :, :, 0] for k in range(4)))
    left = scipy.linalg.block_diag(*(m.params["L"][l, :, 0, :] for l in range(4)))
    swap = np.eye(16).reshape(4, 4, 16).transpose(1, 0, 2).reshape(16, 16)
    same(m.materialize(), right @ swap @ left @ swap)


def test_monarch_error_is_the_sum_over_slices():
    w = normal(16, 24)
    m = structmat.project(w, "block_low_rank(in_blocks=4, out_blocks=3, rank=2)")
    slices = [w[4 * k : 4 * k + 4, 8 * l : 8 * l + 8] for k in range(4) for l in range(3)]
    tails = [np.sum(np.linalg.svd(s, compute_uv=False)[2:] ** 2) for s in slices]
    assert np.linalg.norm(w - m.materialize()) == pytest.approx(np.sqrt(sum(tails)), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank"), mostly_long([((4, 5, 6), 2), ((4, 5, 6), 4), ((3, 4, 3, 4), 3), ((20, 18), 5)], [((4, 5, 6), 2)])
)
def test_tt_svd_is_no_worse_than_tensorlys(shape, rank):
    tensor = normal(*shape)
    form = TensorTrainFormat.of(shape, rank)
    ours = np.linalg.norm(tensor - form.materialize(form.project(jnp.asarray(tensor))))
    theirs = np.linalg.norm(tensor - tensorly.tt_to_tensor(tensorly_train(tensor, (1, *form.ranks, 1))))
    assert ours <= theirs * (1 + 1e-5)
    tails = []
    for k, r in enumerate(form.ranks, 1):
        singular = np.linalg.svd(tensor.reshape(int(np.prod(shape[:k])), -1), compute_uv=False)
        tails.append(np.sum(singular[r:] ** 2))
    assert np.sqrt(max(tails)) * (1 - 1e-5) <= ours <= np.sqrt(sum(tails)) * (1 + 1e-5), "outside Oseledets' bounds"


def test_tensor_train_matrix_is_tensorlys():
    m = drawn("tensor_train(rank=3, cores=3)", 24, 36)
    cores = [np.asarray(m.params[f"core{k}"]) for k in range(3)]
    merged = tensorly.tt_to_tensor([c.reshape(c.shape[0], -1, c.shape[-1]) for c in cores])
    shape = [n for c in cores for n in c.shape[1:3]]
    same(m.materialize(), merged.reshape(shape).transpose(0, 2, 4, 1, 3, 5).reshape(24, 36))


@pytest.mark.parametrize(
    ("sizes", "rank"), thinned([(s, r) for r in (3, 1) for s in ((24, 36), (16, 16), (35, 12))], 2)
)
def test_two_cores_are_a_sum_of_kronecker_products(sizes, rank):
    w = normal(*sizes)
    train, kron = structmat.project(w, f"tensor_train(rank={rank})"), structmat.project(w, f"kronecker(terms={rank})")
    same(train.materialize(), kron.materialize())
    assert train.cost == kron.cost
    assert float(structmat.project(train.materialize(), f"kronecker(terms={rank})").error(train.materialize())) < 1e-5
