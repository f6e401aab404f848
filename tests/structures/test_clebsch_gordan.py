"""Couplings of rotations, against their defining relations and against independent formulas."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy.special import lpmv

from structmat.structures import StructureError
from structmat.structures.clebsch_gordan import (
    block,
    clebsch_gordan,
    degree,
    path_tensor,
    paths,
    unit_path,
    width,
    wigner,
)
from structmat.structures.path_factors import PathFactors, turned

TURNS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3, 3)))[0]
TURNS = TURNS * np.linalg.det(TURNS)[:, None, None]


def harmonics(lmax, points):
    """Real spherical harmonics of unit vectors (n, 3) -> (n, (lmax+1)^2), orthonormal, by associated Legendre functions."""
    x, y, z = points.T
    angle, found = np.arctan2(y, x), []
    for l in range(lmax + 1):
        for m in range(-l, l + 1):
            k = abs(m)
            size = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - k) / math.factorial(l + k))
            wave = math.sqrt(2) * (np.cos(k * angle) if m > 0 else np.sin(k * angle)) if m else 1.0
            found.append((-1) ** k * size * lpmv(k, l, z) * wave)
    return np.stack(found, axis=-1)


def quadrature(order):
    """Points (n, 3) and weights (n,) that integrate polynomials on the sphere exactly up to degree 2 order - 1."""
    z, weights = np.polynomial.legendre.leggauss(order)
    angle = 2 * np.pi * np.arange(2 * order) / (2 * order)
    z, weights = np.repeat(z, 2 * order), np.repeat(weights, 2 * order) * np.pi / order
    root, angle = np.sqrt(1 - z**2), np.tile(angle, order)
    return np.stack([root * np.cos(angle), root * np.sin(angle), z], axis=-1), weights


def generators(l):
    """The three antisymmetric generators of degree l, by finite differences of Wigner matrices that are exact in the limit."""
    step, found = 1e-5, []
    for axis in range(3):
        j, k = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[j, j] = turn[k, k] = math.cos(step)
        turn[k, j], turn[j, k] = math.sin(step), -math.sin(step)
        forth, back = (wigner(l, r)[block(l), block(l)] for r in (turn, turn.T))
        found.append((forth - back) / (2 * step))
    return found


def test_closed_forms_of_degree_one():
    """(1, 1, 0) is minus the dot product over sqrt(3), (1, 1, 1) the cross product over sqrt(2), in the order y, z, x."""
    np.testing.assert_allclose(clebsch_gordan(1, 1, 0)[..., 0], -np.eye(3) / math.sqrt(3), atol=1e-15)
    a, b = np.random.default_rng(0).normal(size=(2, 3))
    order = [1, 2, 0]
    cross = np.einsum("ijk,i,j->k", clebsch_gordan(1, 1, 1), a[order], b[order])
    np.testing.assert_allclose(cross, np.cross(a, b)[order] / math.sqrt(2), atol=1e-15)
    np.testing.assert_allclose(clebsch_gordan(0, 4, 4)[0], np.eye(9), atol=1e-15)
    square = np.einsum("ijk,i,j->k", clebsch_gordan(1, 1, 2), a[order], a[order])
    assert square[2] == pytest.approx((2 * a[2] ** 2 - a[0] ** 2 - a[1] ** 2) / math.sqrt(6))
    assert square[0] == pytest.approx(math.sqrt(2) * a[0] * a[1])


def test_orthogonality():
    """All degrees of one product of two make an orthogonal matrix."""
    for l1, l2 in [(0, 0), (1, 1), (1, 3), (2, 2), (3, 3), (6, 6)]:
        columns = [clebsch_gordan(l1, l2, l3) for l3 in range(abs(l1 - l2), min(l1 + l2, 6) + 1)]
        matrix = np.concatenate(columns, axis=-1).reshape((2 * l1 + 1) * (2 * l2 + 1), -1)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-13)
        if l1 + l2 <= 6:
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-13)


def test_selection_rules():
    """In the real basis an entry couples orders of equal or opposite sign sums, and as many sine orders as the parity asks."""
    assert [len(paths(l, l, l)) for l in range(1, 5)] == [5, 15, 34, 65]
    assert paths(1, 1, 1) == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    assert [np.count_nonzero(path_tensor(l, l, l)) for l in range(1, 5)] == [16, 137, 611, 2052]
    for l1, l2, l3 in paths(3, 3, 3):
        for i, j, k in np.argwhere(clebsch_gordan(l1, l2, l3)).tolist():
            m1, m2, m3 = i - l1, j - l2, k - l3
            assert abs(m3) in (abs(m1 + m2), abs(m1 - m2))
            assert ((m1 < 0) + (m2 < 0) + (m3 < 0)) % 2 == (l1 + l2 + l3) % 2
    assert not path_tensor(0, 1, 2)[..., 4:].any() and path_tensor(0, 1, 2).shape == (1, 4, 9)


@pytest.mark.parametrize(
    "path", [(1, 1, 1), (1, 2, 2), *(pytest.param(p, marks=pytest.mark.long) for p in [(2, 2, 2), (3, 2, 1)])]
)
def test_every_coupling_is_the_only_one(path):
    """The null space of the summed generators is one-dimensional, and is the path."""
    sizes = [2 * l + 1 for l in path]
    eyes = [np.eye(n) for n in sizes]
    rows = []
    for g in zip(*map(generators, path)):
        parts = [[g[i] if i == at else eyes[i] for i in range(3)] for at in range(3)]
        rows.append(sum(np.kron(np.kron(a, b), c) for a, b, c in parts))
    _, s, vt = np.linalg.svd(np.concatenate(rows))
    assert s[-1] < 1e-6 < 0.1 < s[-2]
    assert abs(vt[-1] @ unit_path(*path).reshape(-1)) == pytest.approx(1, abs=1e-9)


def test_paths_begin_with_a_positive_entry_and_have_norm_one():
    for path in itertools.product(range(4), repeat=3):
        if abs(path[0] - path[1]) <= path[2] <= path[0] + path[1]:
            found = unit_path(*path)
            assert found.reshape(-1)[np.flatnonzero(found)[0]] > 0 and np.linalg.norm(found) == pytest.approx(1)


def test_products_of_spherical_harmonics():
    """Gaunt's integral of three of them, by quadrature, is the path times (l1 0 l2 0 | l3 0): zero for odd sums."""
    points, weights = quadrature(8)
    values = harmonics(4, points)
    for l1, l2, l3 in [(1, 1, 2), (2, 2, 2), (1, 2, 2), (3, 4, 3), (4, 4, 4)]:
        gaunt = np.einsum("n,ni,nj,nk->ijk", weights, *(values[:, block(l)] for l in (l1, l2, l3)), optimize=True)
        c = clebsch_gordan(l1, l2, l3)
        size = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) / (4 * math.pi * (2 * l3 + 1)))
        np.testing.assert_allclose(gaunt, size * c[l1, l2, l3] * c, atol=1e-13)
        assert (abs(c[l1, l2, l3]) > 0.1) == ((l1 + l2 + l3) % 2 == 0)


def test_wigner_matrices_turn_spherical_harmonics():
    points = np.random.default_rng(1).normal(size=(5, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for turn, d in zip(TURNS, wigner(6, TURNS)):
        np.testing.assert_allclose(harmonics(6, points @ turn.T), harmonics(6, points) @ d.T, atol=1e-12)
        np.testing.assert_allclose(d @ d.T, np.eye(49), atol=1e-12)
    np.testing.assert_allclose(wigner(4, TURNS[0] @ TURNS[1]), wigner(4, TURNS[0]) @ wigner(4, TURNS[1]), atol=1e-12)


@pytest.mark.parametrize("degrees", [(3, 3, 3), (2, 1, 3), pytest.param((6, 6, 6), marks=pytest.mark.long)], ids=str)
def test_the_sum_of_paths_is_equivariant(degrees):
    weights = np.random.default_rng(2).normal(size=len(paths(*degrees)))
    for tensor in (path_tensor(*degrees), path_tensor(*degrees, weights)):
        np.testing.assert_allclose(turned(tensor, degrees, TURNS[0]), tensor, atol=1e-12)
    norms = [np.linalg.norm(tensor[block(a), block(b), block(c)]) for a, b, c in paths(*degrees)]
    np.testing.assert_allclose(norms, np.abs(weights))


def test_exact_factors_and_their_symmetries():
    """Rank (l+1)^4 holds the tensor; terms may change places and share their size otherwise."""
    factors = PathFactors.exact(2, 1, 2)
    assert factors.rank == 36 and factors.error() == 0 and [len(c) for c in factors.cores] == [9, 4, 9]
    assert factors.equivariance_errors(TURNS).max() < 1e-14
    rng = np.random.default_rng(3)
    order, sizes = rng.permutation(36), rng.uniform(0.5, 2, size=36)
    a, b, c = (core[:, order] for core in factors.cores)
    other = PathFactors(factors.degrees, (a * sizes, b / sizes, c))
    np.testing.assert_allclose(other.materialize(), factors.materialize(), atol=1e-15)


def test_fitted_factors_hold_degree_one():
    """Rank 10 is more than enough for degree 1, whose rank is 8."""
    factors = PathFactors.fit(1, 1, 1, 10)
    assert factors.rank == 10 and factors.cores[0].dtype == np.float64 and not jax.config.jax_enable_x64
    assert factors.error() < 1e-6 and factors.equivariance_errors(TURNS).max() <= 2 * factors.error() + 1e-15


def test_the_equivariance_error_is_that_of_normal_inputs():
    """In closed form as by sampling: for a CP of the paths with a random part added."""
    rng = np.random.default_rng(4)
    exact = PathFactors.exact(1, 1, 1)
    factors = PathFactors((1, 1, 1), tuple(core + 0.1 * rng.normal(size=core.shape) for core in exact.cores))
    (closed,) = factors.equivariance_errors(TURNS[:1])
    d, (x, y) = wigner(1, TURNS[0]), rng.normal(size=(2, 50_000, 4))
    apply = lambda x, y: np.einsum("ni,nj,ijk->nk", x, y, factors.materialize(), optimize=True)
    truth = np.einsum("ni,nj,ijk->nk", x, y, path_tensor(1, 1, 1), optimize=True)
    sampled = np.linalg.norm(apply(x, y) @ d.T - apply(x @ d.T, y @ d.T)) / np.linalg.norm(truth)
    assert closed == pytest.approx(sampled, rel=0.03) and 0.1 < closed <= 2 * factors.error()


@pytest.mark.long
@pytest.mark.parametrize(("lmax", "ranks", "last"), [(1, (4, 5, 7, 8), 1e-4), (2, (14, 20, 28, 34), 1e-3)])
def test_errors_fall_with_rank(lmax, ranks, last):
    """Until it is nearly exact; the equivariance error stays within its bound, but a lower rank may be more symmetric."""
    found = [PathFactors.fit(lmax, lmax, lmax, rank) for rank in ranks]
    errors = [(f.error(), float(np.sqrt(np.mean(f.equivariance_errors(TURNS) ** 2)))) for f in found]
    assert all(after < before for (before, _), (after, _) in itertools.pairwise(errors))
    assert errors[-1][0] < last and all(turn <= 2 * fit for fit, turn in errors)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: clebsch_gordan(1, 1, 3), r"no path \(1, 1, 3\): l3 must be in 0\.\.2"),
        (lambda: clebsch_gordan(7, 1, 7), r"degree 7 must be in 0\.\.6"),
        (lambda: width(-1), r"degree -1 must be in 0\.\.6"),
        (lambda: degree(5), r"5 entries are not \(l\+1\)\^2"),
        (lambda: degree(64), r"64 entries are not \(l\+1\)\^2"),
        (lambda: path_tensor(1, 1, 1, [1.0]), "1 weights for the 5 paths"),
        (lambda: wigner(1, -np.eye(3)), "must be orthogonal with determinant 1"),
        (lambda: wigner(1, np.ones((3, 3))), "must be orthogonal with determinant 1"),
        (lambda: wigner(1, np.eye(4)), r"must be \(\.\.\., 3, 3\)"),
        (lambda: PathFactors.fit(1, 1, 1, 17), r"rank is 17, must be in 1\.\.16"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act()
