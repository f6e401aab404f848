"""The fast transforms as butterflies: a `Matrix` that equals the transform and whose every number can train from there.

Forms after Dao et al. 2019 and 2020 (kaleidoscope); P is a permutation, B a butterfly, all sizes powers of two:

| transform | form |
|---|---|
| `dft`, `inverse_dft` | P B, complex |
| `hadamard` | B, real |
| `dct`, `dst` (type II) | P B P B P, complex blocks whose product is real up to rounding |
| `circulant` | B B' with strides down, then up (inverse transform, diagonal, transform), complex |
| `toeplitz` | [I 0] B B' [I 0]^T, a circulant of at least twice the size, complex |

The cosine and sine transforms take no real part, which is not linear over C: for real x the spectrum V of its reordered
entries has V[n-k] = conj(V[k]), so 2 Re(c V[k]) = c V[k] + conj(c) V[n-k], a 2x2 block after a permutation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structmat.structures.butterfly_stages import Twiddles, scale_side, transposed
from structmat.structures.errors import StructureError
from structmat.structures.matrix import Matrix
from structmat.structures.text import parse


def dft(n: int, dtype: Any = jnp.complex64) -> Matrix:
    """x @ dft(n) = numpy.fft.fft(x): bit reversal, then the butterfly of decimation in time (Cooley and Tukey 1965).

    Raises:
      StructureError: n is not a power of two (as in all functions here).
    """
    bound = parse("permutation() @ butterfly(field='complex')").bind(n, n)
    return Matrix(bound, {"0": _index(_reversal(n)), "1": _stages(_fourier(n, -1), dtype)})


def inverse_dft(n: int, dtype: Any = jnp.complex64) -> Matrix:
    """x @ inverse_dft(n) = numpy.fft.ifft(x)."""
    bound = parse("permutation() @ butterfly(field='complex')").bind(n, n)
    return Matrix(bound, {"0": _index(_reversal(n)), "1": _stages(_fourier(n, 1), dtype)})


def hadamard(n: int, dtype: Any = jnp.float32) -> Matrix:
    """The Sylvester-Hadamard matrix of entries +-1, as scipy.linalg.hadamard."""
    bound = parse("butterfly()").bind(n, n)
    block = np.array([[1.0, 1.0], [1.0, -1.0]])
    return Matrix(bound, _stages([np.tile(block[..., None], n // 2)] * bound.stages, dtype))


def dct(n: int, dtype: Any = jnp.complex64) -> Matrix:
    """x @ dct(n) = scipy.fft.dct(x), type II, real up to rounding (Makhoul 1980)."""
    return _cosine(n, np.ones(n), np.arange(n), dtype)


def dst(n: int, dtype: Any = jnp.complex64) -> Matrix:
    """x @ dst(n) = scipy.fft.dst(x), type II: the cosine transform of (-1)^j x[j], in reversed order."""
    return _cosine(n, (-1.0) ** np.arange(n), np.arange(n)[::-1], dtype)


def circulant(c: jax.Array) -> Matrix:
    """The matrix W[i, j] = c[(i - j) mod n] of scipy.linalg.circulant(c), c `(n,)`.

    W = F^-1 diag(fft(c)) F; the bit reversals of the two transforms cancel and the diagonal joins a stage.
    """
    c = _vector(c, "c")
    bound = parse("butterfly(increasing=False, depth=2, field='complex')").bind(len(c), len(c))
    return Matrix(bound, _circulant_stages(c))


def toeplitz(c: jax.Array, r: jax.Array | None = None) -> Matrix:
    """The matrix (n, m) of scipy.linalg.toeplitz(c, r): W[i, j] = c[i - j] for i >= j, else r[j - i]; any n and m.

    The corner of a circulant of the next power of two N >= n + m - 1. The frozen [I 0] (n, N) and its counterpart are
    random_sparse with one entry a column, a gather each. `r` left out is conj(c), as in scipy.
    """
    c = _vector(c, "c")
    r = c.conj() if r is None else _vector(r, "r")
    n, m = len(c), len(r)
    size = max(2, 1 << (n + m - 2).bit_length())
    pad, crop = f"frozen(random_sparse(density={1 / n!r}))", f"frozen(random_sparse(density={1 / size!r}))"
    middle = "butterfly(increasing=False, depth=2, field='complex')"
    bound = parse(f"product({pad} @ {middle}, {crop}, inner={size})").bind(n, m)
    wrapped = np.concatenate([c, np.zeros(size - n - m + 1, c.dtype), r[:0:-1]])
    select = lambda rows, columns: {
        "values": jnp.asarray((np.arange(columns) < rows)[:, None], jnp.finfo(_complex(c)).dtype),
        "rows": jnp.asarray(np.where(np.arange(columns) < rows, np.arange(columns), 0)[:, None], jnp.int32),
    }
    return Matrix(bound, {"0": {"0": select(n, size), "1": _circulant_stages(wrapped)}, "1": select(size, m)})


def _cosine(n: int, signs: np.ndarray, order: np.ndarray, dtype: Any) -> Matrix:
    """The type II cosine transform of signs * x, its outputs in the given order."""
    text = "permutation() @ butterfly(field='complex') @ permutation() @ butterfly(field='complex') @ permutation()"
    bound = parse(text).bind(n, n)
    reordered = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])[_reversal(n)]
    first = _fourier(n, -1)
    first[0] = np.asarray(scale_side(first[0], 1, signs[reordered], 0))
    k = np.arange(n // 2)
    pairs = np.stack([k, np.where(k == 0, n // 2, n - k)], axis=1).reshape(-1)
    turn = np.exp(-0.5j * np.pi * pairs / n).reshape(-1, 2)
    mix = np.where(
        k == 0,
        np.diag([2.0, 2**0.5])[..., None],
        np.array([[turn[:, 0], turn[:, 1].conj()], [turn[:, 0].conj(), turn[:, 1]]]),
    )
    rest = [np.tile(np.eye(2)[..., None], n // 2)] * (len(first) - 1)
    back = np.argsort(pairs)[order]
    forward = {"0": {"0": _index(reordered), "1": _stages(first, dtype)}, "1": _index(pairs)}
    return Matrix(bound, {"0": {"0": forward, "1": _stages([mix, *rest], dtype)}, "1": _index(back)})


def _circulant_stages(c: np.ndarray) -> dict[str, jax.Array]:
    n = len(c)
    up = _fourier(n, -1)
    up[0] = np.asarray(scale_side(up[0], 1, np.fft.fft(c)[_reversal(n)], 0))
    return _stages([*transposed(_fourier(n, 1)), *up], _complex(c))


def _fourier(n: int, sign: int) -> list[np.ndarray]:
    """Stages of the transform of exponent `sign`, for inputs in bit-reversed order; the inverse (+1) carries 1/n."""
    stages = []
    for k in range(n.bit_length() - 1):
        turn = np.tile(np.exp(sign * 1j * np.pi * np.arange(2**k) / 2**k), n >> (k + 1))
        one = np.ones_like(turn)
        stages.append(np.array([[one, one], [turn, -turn]]) / (2 if sign > 0 else 1))
    return stages


def _reversal(n: int) -> np.ndarray:
    """Every index with its bits in reverse order."""
    order = np.zeros(1, int)
    while len(order) < n:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


def _index(order: np.ndarray) -> dict[str, jax.Array]:
    return {"index": jnp.asarray(order, jnp.int32)}


def _stages(stages: Twiddles, dtype: Any) -> dict[str, jax.Array]:
    return {f"stage{k}": jnp.asarray(t, dtype) for k, t in enumerate(stages)}


def _complex(c: np.ndarray) -> Any:
    return jnp.promote_types(jnp.asarray(c).dtype, jnp.complex64)


def _vector(c: jax.Array, what: str) -> np.ndarray:
    c = np.asarray(c)
    if c.ndim != 1 or not c.size:
        raise StructureError(f"{what} must be a vector with at least one entry, got shape {c.shape}")
    return c
