"""Coupling of rotations in the real basis: Clebsch-Gordan coefficients, Wigner matrices and the path-summed tensor.

All in f64 by NumPy, up to degree 6. A feature of degrees 0..l has (l+1)^2 entries, degree after degree, within a degree in
orders -l..l of the real spherical harmonics without the Condon-Shortley sign, so that degree 1 is (y, z, x). Signs and norms of
the paths change their sum and its CP rank: signs and norms are those of `unit_path`.

Paths summed with shared weights: Lin et al., "Tensor Decomposition Networks for Fast Machine Learning Interatomic Potential
Computations", NeurIPS 2025, arXiv 2507.01131. Racah's formula: Varshalovich et al. 1988, 8.2.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from structmat.structures.errors import StructureError

LARGEST = 6
"""Degrees above it are refused: nothing beyond is tested."""

Path = tuple[int, int, int]


def width(lmax: int) -> int:
    """(lmax + 1)^2, the entries of degrees 0..lmax."""
    _check(lmax)
    return (lmax + 1) ** 2


def degree(entries: int) -> int:
    """The lmax of a feature of so many entries.

    Raises:
      StructureError: not (l+1)^2 for an l up to 6.
    """
    found = math.isqrt(max(entries, 0)) - 1
    if (found + 1) ** 2 != entries or not 0 <= found <= LARGEST:
        raise StructureError(f"{entries} entries are not (l+1)^2 of any degree l in 0..{LARGEST}; 1, 4, 9, 16, ... are")
    return found


def block(l: int) -> slice:
    """Where the 2l+1 entries of degree l lie."""
    return slice(l * l, (l + 1) ** 2)


def paths(left: int, right: int, out: int) -> list[Path]:
    """The (l1, l2, l3) with |l1 - l2| <= l3 <= l1 + l2 and degrees up to those named, in ascending order."""
    _check(left, right, out)
    return [
        (l1, l2, l3)
        for l1 in range(left + 1)
        for l2 in range(right + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, out) + 1)
    ]


@functools.cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """Real coefficients C f64 (2 l1+1, 2 l2+1, 2 l3+1), read-only: c_k = sum_ij C_ijk a_i b_j has degree l3.

    Orthonormal: sum_ij C_ijk C_ijk' = [k = k'], and over all l3 the columns make an orthogonal matrix. Signs are Condon and
    Shortley's, <l1 l1 l2 (l3-l1) | l3 l3> > 0, carried to the real basis; where l1+l2+l3 is odd that gives i C, and C with the
    sign by which (1, 1, 1) is the cross product over sqrt(2). The complex ones are by Racah's formula in exact fractions.

    Raises:
      StructureError: a degree outside 0..6, or no path: the triangle inequality fails.
    """
    _check(l1, l2, l3)
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        raise StructureError(f"no path ({l1}, {l2}, {l3}): l3 must be in {abs(l1 - l2)}..{l1 + l2}")
    q1, q2, q3 = (_real_basis(l) for l in (l1, l2, l3))
    phase = -1j if (l1 + l2 + l3) % 2 else 1
    found = np.einsum("am,bn,mnp,cp->abc", q1.conj(), q2.conj(), _racah(l1, l2, l3), q3, optimize=True) * phase
    real = np.where(np.abs(found.real) > 1e-14, found.real, 0.0)
    real.flags.writeable = False
    return real


def path_tensor(left: int, right: int, out: int, weights: Sequence[float] | None = None) -> np.ndarray:
    """M f64 ((left+1)^2, (right+1)^2, (out+1)^2): the sum of all paths, each of Frobenius norm 1 times its weight.

    Args:
      weights: of the paths in the order of `paths`; all 1 if left out.
    """
    found = paths(left, right, out)
    weights = [1.0] * len(found) if weights is None else list(weights)
    if len(weights) != len(found):
        raise StructureError(f"path_tensor: {len(weights)} weights for the {len(found)} paths of {(left, right, out)}")
    tensor = np.zeros((width(left), width(right), width(out)))
    for (l1, l2, l3), weight in zip(found, weights):
        tensor[block(l1), block(l2), block(l3)] = weight * unit_path(l1, l2, l3)
    return tensor


def unit_path(l1: int, l2: int, l3: int) -> np.ndarray:
    """The 3j symbol of the path: `clebsch_gordan` over sqrt(2 l3 + 1), of Frobenius norm 1, its first non-zero entry positive.

    Condon and Shortley's signs would do as well one path at a time; summed, they make of degree 1 nearly the product of
    quaternions, whose rank is 8.
    """
    found = clebsch_gordan(l1, l2, l3) / math.sqrt(2 * l3 + 1)
    return math.copysign(1.0, found.reshape(-1)[np.flatnonzero(found)[0]]) * found


def wigner(lmax: int, rotation: np.ndarray) -> np.ndarray:
    """D f64 (..., (lmax+1)^2, (lmax+1)^2), block diagonal: a feature f becomes D f when space turns by `rotation` (..., 3, 3).

    Degree 1 is the rotation itself in the order (y, z, x), and degree l the part of degree l-1 times degree 1 that has it,
    D_l = C^T (D_{l-1} x D_1) C.

    Raises:
      StructureError: not orthogonal matrices of determinant 1.
    """
    rotation = np.asarray(rotation, np.float64)
    if rotation.shape[-2:] != (3, 3):
        raise StructureError(f"wigner: rotation has shape {rotation.shape}, must be (..., 3, 3)")
    off = np.abs(rotation @ rotation.swapaxes(-1, -2) - np.eye(3)).max(initial=0.0)
    if not off < 1e-9 or not np.all(np.linalg.det(rotation) > 0):
        raise StructureError(f"wigner: rotation must be orthogonal with determinant 1; R R^T is off by {off:.1e}")
    order = [1, 2, 0]
    first = rotation[..., order, :][..., order]
    blocks = [np.ones((*rotation.shape[:-2], 1, 1)), first]
    for l in range(2, lmax + 1):
        c = clebsch_gordan(l - 1, 1, l)
        blocks.append(np.einsum("abc,...ad,...be,def->...cf", c, blocks[-1], first, c, optimize=True))
    out = np.zeros((*rotation.shape[:-2], width(lmax), width(lmax)))
    for l in range(lmax + 1):
        out[..., block(l), block(l)] = blocks[l]
    return out


def _check(*degrees: int) -> None:
    for l in degrees:
        if not 0 <= l <= LARGEST:
            raise StructureError(f"degree {l} must be in 0..{LARGEST}")


def _real_basis(l: int) -> np.ndarray:
    """Q complex (2l+1, 2l+1): real basis vector a is sum_m Q[a, m] |l m>."""
    q = np.zeros((2 * l + 1, 2 * l + 1), complex)
    q[l, l] = 1
    for m in range(1, l + 1):
        sign, root = (-1) ** m, math.sqrt(0.5)
        q[l + m, l - m], q[l + m, l + m] = root, sign * root
        q[l - m, l - m], q[l - m, l + m] = 1j * root, -1j * sign * root
    return q


def _racah(l1: int, l2: int, l3: int) -> np.ndarray:
    """<l1 m1 l2 m2 | l3 m3> f64 (2 l1+1, 2 l2+1, 2 l3+1); squares are exact fractions until the last root."""
    f = math.factorial
    common = Fraction((2 * l3 + 1) * f(l3 + l1 - l2) * f(l3 - l1 + l2) * f(l1 + l2 - l3), f(l1 + l2 + l3 + 1))
    out = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            m3 = m1 + m2
            total = Fraction(0)
            for k in range(max(0, l2 - l3 - m1, l1 - l3 + m2), min(l1 + l2 - l3, l1 - m1, l2 + m2) + 1):
                below = f(k) * f(l1 + l2 - l3 - k) * f(l1 - m1 - k) * f(l2 + m2 - k)
                total += Fraction((-1) ** k, below * f(l3 - l2 + m1 + k) * f(l3 - l1 - m2 + k))
            size = common * f(l3 + m3) * f(l3 - m3) * f(l1 - m1) * f(l1 + m1) * f(l2 - m2) * f(l2 + m2)
            out[l1 + m1, l2 + m2, l3 + m3] = math.copysign(math.sqrt(size * total * total), total)
    return out
