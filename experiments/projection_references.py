"""Projections by other libraries, in double precision, for `experiments.projection`: numpy, scipy, scikit-learn, tensorly.

Each takes a dense matrix and a Bound, reads sizes and ranks from the Bound and nothing else, and returns the matrix it finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.optimize
import tensorly
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.linear_model import orthogonal_mp_gram
from tensorly import decomposition

from structmat.structures import Bound
from structmat.structures.algebra import SWEEPS
from structmat.structures.sparse_coding import ROUNDS

Reference = Callable[[np.ndarray, Bound], np.ndarray]
ITERATIONS = 100
"""Of tensorly's alternating algorithms, its default, with a tolerance that does not stop them before."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A structure and who else projects onto it.

    Attributes:
      text: of the structure; {r} stands for a sixteenth of the rows (2 at least), {k} for a quarter.
      square: whether it needs as many columns as rows.
      name: of the reference, "-" where there is none.
      reference: None where there is none.
    """

    text: str
    name: str
    reference: Reference | None
    square: bool = False


# -- singular value decompositions -----------------------------------------------------------------------------------------


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    """The best matrix of this rank."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def low_rank(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Eckart and Young."""
    return truncated(w, bound.structure.rank)


def slices(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Block low rank, Monarch and block tensor train of two cores: slice by slice."""
    k, p, l, s, r = bound.sizes
    found = np.zeros_like(w)
    for i in range(k):
        for j in range(l):
            columns = slice(j * s, (j + 1) * s) if bound.order == "blocked" else slice(j, None, l)
            found[i * p : (i + 1) * p, columns] = truncated(w[i * p : (i + 1) * p, columns], r)
    return found


def einsum(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Slices by the digits (g, b, a) of the row and (f, e, d) of the column: rows (a, d), columns (b, e)."""
    alpha, beta, gamma, delta, epsilon, phi, r = bound.sizes
    t = w.reshape(gamma, beta, alpha, phi, epsilon, delta)
    found = np.zeros_like(t)
    for g in range(gamma):
        for f in range(phi):
            matrix = np.einsum("baed->adbe", t[g, :, :, f]).reshape(alpha * delta, beta * epsilon)
            found[g, :, :, f] = np.einsum("adbe->baed", truncated(matrix, r).reshape(alpha, delta, beta, epsilon))
    return found.reshape(w.shape)


def kronecker(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Van Loan and Pitsianis: one row of the rearranged matrix per block of w."""
    (n1, n2), (m1, m2) = bound.structure.in_factors, bound.structure.out_factors
    blocks = [(i, j) for i in range(n1) for j in range(m1)]
    place = lambda i, j: (slice(i * n2, (i + 1) * n2), slice(j * m2, (j + 1) * m2))
    rearranged = truncated(np.stack([w[place(*at)].ravel() for at in blocks]), bound.structure.terms)
    found = np.zeros_like(w)
    for at, row in zip(blocks, rearranged):
        found[place(*at)] = row.reshape(n2, m2)
    return found


def householder(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The polar factor of the leading singular vectors."""
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    k = bound.structure.reflections
    return u[:, :k] @ vt[:k]


# -- tensors ---------------------------------------------------------------------------------------------------------------


def paired(w: np.ndarray, modes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """w as a tensor of one axis per pair of an input and an output factor."""
    count = len(modes)
    t = w.reshape([n for n, _ in modes] + [m for _, m in modes])
    return t.transpose([a for k in range(count) for a in (k, count + k)]).reshape([n * m for n, m in modes])


def unpaired(t: np.ndarray, modes: tuple[tuple[int, int], ...], shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `paired`."""
    count = len(modes)
    t = t.reshape([size for mode in modes for size in mode])
    return t.transpose([2 * k for k in range(count)] + [2 * k + 1 for k in range(count)]).reshape(shape)


def tensor_train(w: np.ndarray, bound: Bound) -> np.ndarray:
    """TT-SVD."""
    modes = bound.format.modes
    cores = decomposition.tensor_train(paired(w, modes), (1, *bound.format.ranks, 1))
    return unpaired(tensorly.tt_to_tensor(cores), modes, w.shape)


def tensor_ring(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The nearer of TR-SVD and alternating least squares."""
    modes, ranks = bound.format.modes, [*bound.format.ranks, bound.format.ranks[0]]
    t, found = paired(w, modes), []
    if ranks[0] * ranks[1] <= t.shape[0]:
        found.append(decomposition.tensor_ring(t, ranks))
    found.append(decomposition.tensor_ring_als(t, ranks, n_iter_max=ITERATIONS, tol=1e-12, random_state=0))
    return nearest(w, [unpaired(tensorly.tr_to_tensor(cores), modes, w.shape) for cores in found])


def tucker(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Higher-order orthogonal iteration."""
    t = w.reshape(bound.format.axes)
    return decomposition_tucker(t, bound.format.ranks).reshape(w.shape)


def decomposition_tucker(t: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """The nearest tensor of these ranks that the iteration finds from the HOSVD."""
    return tensorly.tucker_to_tensor(decomposition.tucker(t, ranks, n_iter_max=ITERATIONS, init="svd", tol=1e-12))


def cp(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Alternating least squares, from the SVD where it has as many vectors as terms."""
    t = w.reshape(bound.format.axes)
    init = "svd" if bound.format.rank <= min(t.shape) else "random"
    factors = decomposition.parafac(t, bound.format.rank, n_iter_max=ITERATIONS, init=init, tol=1e-12, random_state=0)
    return tensorly.cp_to_tensor(factors).reshape(w.shape)


def nearest(w: np.ndarray, found: list[np.ndarray]) -> np.ndarray:
    """Whichever is nearest to w."""
    return min(found, key=lambda m: np.linalg.norm(w - m))


# -- shared and selected entries -------------------------------------------------------------------------------------------


def toeplitz(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The mean of each diagonal."""
    n, m = w.shape
    column = [np.mean(np.diagonal(w, -k)) for k in range(n)]
    return scipy.linalg.toeplitz(column, [np.mean(np.diagonal(w, k)) for k in range(m)])


def circulant(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The mean of each wrapped diagonal."""
    rows = np.arange(len(w))
    return scipy.linalg.circulant([np.mean(w[rows, (rows + k) % len(w)]) for k in rows]).T


def block_circulant(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Block by block."""
    b, found = bound.structure.block, np.zeros_like(w)
    for i in range(0, w.shape[0], b):
        for j in range(0, w.shape[1], b):
            found[i : i + b, j : j + b] = circulant(w[i : i + b, j : j + b], bound)
    return found


def diagonal(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Its diagonal."""
    return np.diag(np.diag(w))


def block_diagonal(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Its diagonal blocks."""
    blocks = bound.structure.blocks
    return w * scipy.linalg.block_diag(*np.ones((blocks, w.shape[0] // blocks, w.shape[1] // blocks)))


def largest(w: np.ndarray, score: np.ndarray, count: int) -> np.ndarray:
    """w where its score is among the `count` largest of its column (axis 0)."""
    keep = np.argsort(-score, axis=0, kind="stable")[:count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, keep, True, 0)
    return np.where(mask, w, 0)


def per_column(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The largest entries of every column."""
    return largest(w, np.abs(w), round(bound.structure.density * len(w)))


def n_m(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The n largest of every m entries of a column."""
    group = bound.structure.m
    parts = [largest(part, np.abs(part), bound.structure.n) for part in np.split(w, len(w) // group)]
    return np.concatenate(parts)


def blocks(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The blocks of largest norm in every block column."""
    p, s = np.broadcast_to(bound.structure.block, 2)
    tiles = w.reshape(len(w) // p, p, -1, s)
    norms = np.linalg.norm(tiles, axis=(1, 3))
    kept = largest(np.ones(norms.shape), norms, round(bound.structure.density * len(norms)))
    return (tiles * kept[:, None, :, None]).reshape(w.shape)


def channels(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The rows of largest norm."""
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    return w * largest(np.ones(norms.shape), norms, round(bound.structure.density * len(w)))


def permutation(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The assignment of largest sum."""
    rows, columns = scipy.optimize.linear_sum_assignment(w, maximize=True)
    found = np.zeros_like(w)
    found[rows, columns] = 1
    return found


def absmax(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Round to nearest with the scale that maps the largest entry of a group to the largest level."""
    top, group = 2 ** (bound.structure.bits - 1) - 1, bound.structure.group
    t = w.T.reshape(-1, group)
    scale = np.abs(t).max(1, keepdims=True) / top
    codes = np.clip(np.rint(np.divide(t, scale, out=np.zeros_like(t), where=scale > 0)), -top - 1, top)
    return (codes * scale).reshape(w.T.shape).T


# -- alternations ----------------------------------------------------------------------------------------------------------


def godec(w: np.ndarray, bound: Bound) -> np.ndarray:
    """Zhou and Tao 2011 with exact SVDs: low rank and the largest entries of every column in turn."""
    first, second = bound.terms
    count = round(second.structure.density * len(w))
    sparse = np.zeros_like(w)
    for _ in range(SWEEPS + 1):
        low = truncated(w - sparse, first.structure.rank)
        sparse = largest(w - low, np.abs(w - low), count)
    return low + sparse


def dictionary(w: np.ndarray, bound: Bound) -> np.ndarray:
    """The nearer of scikit-learn's online learning, coded by its matching pursuit, and K-SVD (Aharon et al. 2006) on it."""
    atoms, count = bound.structure.atoms, bound.structure.nonzeros
    scale = np.abs(w).max()
    learner = MiniBatchDictionaryLearning(
        atoms, transform_algorithm="omp", transform_n_nonzero_coefs=count, random_state=0, alpha=0.1, max_iter=50
    )
    d = unit(learner.fit(w.T / scale).components_.T)
    rng = np.random.default_rng(0)
    starts = [d, unit(w[:, rng.choice(w.shape[1], atoms, replace=False)])]
    return nearest(w, [found for start in starts for found in ksvd(w, start, count)])


def unit(d: np.ndarray) -> np.ndarray:
    """Columns of norm 1; zero ones stay."""
    return d / np.maximum(np.linalg.norm(d, axis=0), 1e-30)


def ksvd(w: np.ndarray, d: np.ndarray, count: int) -> list[np.ndarray]:
    """The matrix after coding and after every round of atom updates."""
    found = []
    for _ in range(ROUNDS):
        code = orthogonal_mp_gram(d.T @ d, d.T @ w, n_nonzero_coefs=count).reshape(d.shape[1], -1)
        found.append(d @ code)
        for k in range(d.shape[1]):
            used = np.flatnonzero(code[k])
            if not used.size:
                continue
            rest = w[:, used] - d @ code[:, used] + np.outer(d[:, k], code[k, used])
            u, s, vt = np.linalg.svd(rest, full_matrices=False)
            d[:, k], code[k, used] = u[:, 0], s[0] * vt[0]
        found.append(d @ code)
    return found


def fixed(matrix: Callable[[int], np.ndarray]) -> Reference:
    """A transform that does not depend on w."""
    return lambda w, bound: matrix(len(w))


ROWS = [
    Row("low_rank(rank={r})", "numpy SVD", low_rank),
    Row("spectral(rank={r})", "numpy SVD", low_rank),
    Row("diagonal()", "numpy diagonal", diagonal, square=True),
    Row("block_diagonal(blocks=4)", "scipy block_diag", block_diagonal),
    Row("block_low_rank(in_blocks=4, out_blocks=2, rank=2)", "numpy SVD per slice", slices),
    Row("monarch(blocks=4)", "numpy SVD per slice", slices),
    Row("monarch(blocks=4, order='blocked')", "numpy SVD per slice", slices),
    Row("block_tensor_train(rank=2)", "numpy SVD per slice", slices),
    Row("block_tensor_train(rank=2, cores=3)", "-", None),
    Row("einsum(theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0.2))", "numpy SVD per slice", einsum),
    Row("kronecker()", "numpy SVD, rearranged", kronecker),
    Row("kronecker(terms=4)", "numpy SVD, rearranged", kronecker),
    Row("tensor_train(rank=4)", "tensorly tensor_train", tensor_train),
    Row("tensor_train(rank=4, cores=3)", "tensorly tensor_train", tensor_train),
    Row("tensor_ring(rank=2)", "tensorly tensor_ring, _als", tensor_ring),
    Row("tucker(rank=6)", "tensorly tucker (HOOI)", tucker),
    Row("cp(rank=8)", "tensorly parafac (ALS)", cp),
    Row("blast(blocks=4, rank={r})", "numpy SVD (a member)", low_rank),
    Row("butterfly()", "-", None, square=True),
    Row("random_sparse(density=0.125, select='magnitude')", "numpy argsort", per_column),
    Row("n_m_sparse(2, 4)", "numpy argsort", n_m),
    Row("block_sparse(block=4, density=0.25, pattern='magnitude')", "numpy argsort", blocks),
    Row("channel_sparse(density=0.25, select='norm')", "numpy argsort", channels),
    Row("low_rank(rank={r}) + random_sparse(density=0.125, select='magnitude')", "numpy GoDec", godec),
    Row("dictionary(atoms={k}, nonzeros=3)", "scikit-learn OMP, K-SVD", dictionary),
    Row("quantized(bits=4, group=8)", "absmax rounding", absmax),
    Row("quantized(bits=8, group=8)", "absmax rounding", absmax),
    Row("toeplitz()", "numpy diagonal means", toeplitz),
    Row("circulant()", "numpy diagonal means", circulant, square=True),
    Row("block_circulant(block=8)", "numpy diagonal means", block_circulant),
    Row("householder(reflections={r})", "numpy SVD, polar", householder),
    Row("permutation()", "scipy linear_sum_assignment", permutation, square=True),
    Row("identity()", "numpy eye", fixed(np.eye), square=True),
    Row("fourier()", "scipy dft", fixed(lambda n: scipy.linalg.dft(n, scale="sqrtn")), square=True),
    Row("dct()", "scipy dct", fixed(lambda n: scipy.fft.dct(np.eye(n), norm="ortho", axis=1)), square=True),
    Row("hadamard()", "scipy hadamard", fixed(lambda n: scipy.linalg.hadamard(n) / math.sqrt(n)), square=True),
]
"""The table, one line per structure."""
