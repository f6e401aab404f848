"""Discrete cosine and sine transforms as fixed orthonormal matrices (Ahmed et al. 1974; Makhoul 1980)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from structmat.structures.about import About
from structmat.structures.errors import StructureError, nearest
from structmat.structures.fft import by_rows, fft_flops
from structmat.structures.leaf import Params, Shape
from structmat.structures.recipe import Structure
from structmat.structures.transform import BoundTransform, cosine, multiply_mod, need_square

TRANSPOSED = {1: 1, 2: 3, 3: 2, 4: 4}
"""The kind of the transposed, which is also the inverse, transform."""


@dataclasses.dataclass(frozen=True, repr=False)
class Dct(Structure):
    """`dct(kind=2, sine=False)`: x @ W = scipy.fft.dct(x, type=kind, norm='ortho'), or scipy.fft.dst with `sine`.

    Square, orthonormal, no parameters. Kind 3 is the transpose of kind 2; 1 and 4 are symmetric; the cosine transform of
    kind 1 needs a size of at least 2.
    """

    kind: int = 2
    sine: bool = False
    name: ClassVar[str] = "dct"
    square: ClassVar[bool] = True
    about: ClassVar[About] = About(
        example="dct()",
        formula="C[j,k] = √(2/n) cos(π (2j+1) k / 2n), C[·,0] / √2",
        params="0",
        flops="2.5 n log₂ n + n/2",
        nearest="itself (fixed)",
        sharding="nothing stored; rows of x split, features gathered",
        paper="Ahmed et al. 1974; Makhoul 1980",
        when="compacting smooth inputs; mixing at no parameters",
    )

    def check(self) -> None:
        if self.kind not in TRANSPOSED:
            raise StructureError(
                f"dct: kind must be 1, 2, 3 or 4, got {self.kind}; nearest: {nearest(self.kind, TRANSPOSED, 1)}"
            )

    def _bind(self, in_shape: Shape, out_shape: Shape) -> BoundDct:
        n = need_square(self, in_shape, out_shape)
        if n < 2 and self.kind == 1 and not self.sine:
            raise StructureError("dct: kind=1 needs a size of at least 2, got 1; kind=2 takes any")
        return BoundDct(self, in_shape, out_shape)


@dataclasses.dataclass(frozen=True, repr=False)
class BoundDct(BoundTransform):
    """A cosine or sine transform with sizes. No leaves. bf16 and f16 inputs are transformed in f32 and cast back."""

    def matmul(self, params: Params, x: jax.Array) -> jax.Array:
        return self._transform(self.structure.kind, x)

    def rmatmul(self, params: Params, y: jax.Array) -> jax.Array:
        return self._transform(TRANSPOSED[self.structure.kind], y)

    def transpose(self) -> BoundDct:
        """The transform of the transposed kind."""
        other = dataclasses.replace(self.structure, kind=TRANSPOSED[self.structure.kind])
        return BoundDct(other, self.out_shape, self.in_shape)

    def _transform(self, kind: int, x: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            return lax.complex(self._transform(kind, x.real), self._transform(kind, x.imag))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (_first, _second, _third, _fourth)[kind - 1](wide, self.structure.sine).astype(x.dtype)

    def _entries(self, i: jax.Array, j: jax.Array) -> jax.Array:
        n, kind, sine = self.d_in, self.structure.kind, self.structure.sine
        if kind == 1:  # cos(2 pi 2 i j / m), m = 4 (n - 1); for sine 2 (i + 1) (j + 1), m = 4 (n + 1)
            m, a, b = (4 * (n + 1), 2 * (i + 1), j + 1) if sine else (4 * (n - 1), 2 * i, j)
        else:  # halves (2 i + 1) / 2 on the input of kinds 2 and 4, on the output of kinds 3 and 4
            shift = 1 if sine else 0
            a = 2 * i + 1 if kind in (2, 4) else i + shift
            b = 2 * j + 1 if kind in (3, 4) else j + shift
            m = 8 * n if kind == 4 else 4 * n
        turn = multiply_mod(a % m, b % m, m)
        if sine:  # sin(t) = cos(t - pi / 2)
            turn = jnp.where(turn < m // 4, turn + (m - m // 4), turn - m // 4)
        value = cosine(turn, m) * math.sqrt(8 / m if kind == 1 else 2 / n)
        for index, ends in ((i, kind == 3), (j, kind == 2)):
            if ends:
                value = jnp.where(index == (n - 1 if sine else 0), value * math.sqrt(0.5), value)
        if kind == 1 and not sine:
            for index in (i, j):
                value = jnp.where((index == 0) | (index == n - 1), value * math.sqrt(0.5), value)
        return value

    def _flops(self, rows: int) -> int:
        n, kind, sine = self.d_in, self.structure.kind, self.structure.sine
        if kind == 1:
            return fft_flops(rows, 2 * (n + 1) if sine else 2 * (n - 1), real=True) + (0 if sine else 2 * rows * n)
        if kind < 4:
            return fft_flops(rows, n, real=True) + rows * (n // 2 + 1)
        if n % 2 == 0:
            return fft_flops(rows, n // 2) + rows * n
        return fft_flops(rows, n, real=True) + 2 * rows * n


def _first(x: jax.Array, sine: bool) -> jax.Array:
    """Kind 1: the real FFT of the even extension, of length 2 (n - 1); for sine of the odd one, of length 2 (n + 1)."""
    n = x.shape[-1]
    if sine:
        zero = jnp.zeros((*x.shape[:-1], 1), x.dtype)
        odd = jnp.concatenate([zero, x, zero, -x[..., ::-1]], -1)
        return -by_rows(jnp.fft.rfft, odd).imag[..., 1 : n + 1] * (2 * (n + 1)) ** -0.5
    ends = np.ones(n)
    ends[[0, -1]] = math.sqrt(2)
    x = x * jnp.asarray(ends, x.dtype)
    even = jnp.concatenate([x, x[..., -2:0:-1]], -1)
    return by_rows(jnp.fft.rfft, even).real * jnp.asarray(1 / (ends * math.sqrt(2 * (n - 1))), x.dtype)


def _second(x: jax.Array, sine: bool) -> jax.Array:
    """Kind 2 by one real FFT of length n: even entries, then odd ones backwards; a sine is a cosine of alternating signs,
    read backwards."""
    n = x.shape[-1]
    odd = x[..., 1::2][..., ::-1]
    z = by_rows(jnp.fft.rfft, jnp.concatenate([x[..., ::2], -odd if sine else odd], -1)) * _turns(n, x.dtype)
    y = jnp.concatenate([z.real, -z.imag[..., (n - 1) // 2 : 0 : -1]], -1)
    return y[..., ::-1] if sine else y


def _third(x: jax.Array, sine: bool) -> jax.Array:
    """Kind 3: `_second` undone step by step."""
    n = x.shape[-1]
    x = x[..., ::-1] if sine else x
    ahead = jnp.concatenate([jnp.zeros((*x.shape[:-1], 1), x.dtype), x[..., : (n - 1) // 2 : -1]], -1)
    z = lax.complex(x[..., : n // 2 + 1], -ahead[..., : n // 2 + 1]) * _turns(n, x.dtype, -1)
    v = by_rows(lambda z: jnp.fft.irfft(z, n=n), z)
    odd = v[..., (n + 1) // 2 :][..., ::-1]
    return _interleave(v[..., : (n + 1) // 2], -odd if sine else odd)


def _fourth(x: jax.Array, sine: bool) -> jax.Array:
    """Kind 4 by one complex FFT of length n/2, or for odd n by a real one of length n (Chan and Ho 1992); a sine is the
    cosine of the reversed input with alternating signs."""
    n = x.shape[-1]
    x = x[..., ::-1] if sine else x
    if n % 2:
        return _fourth_odd(x, sine)
    k = np.arange(n // 2)
    turn = jnp.asarray(np.exp(-1j * np.pi * (8 * k + 1) / (8 * n)), jnp.result_type(x.dtype, jnp.complex64))
    z = lax.complex(x[..., ::2], x[..., ::-1][..., ::2]) * turn
    z = by_rows(lambda z: jnp.fft.fft(z, norm="ortho"), z) * turn
    odd = z.imag[..., ::-1]
    return _interleave(z.real, odd if sine else -odd)


def _fourth_odd(x: jax.Array, sine: bool) -> jax.Array:
    n = x.shape[-1]
    # cos(2 pi (2 k + 1) q / 8 n), q = 2 j + 1, is even in q and changes sign at q + 4 n: of the four such odd numbers one
    # is 1 mod 8, and over those, q = 1 + 8 t, the sum is a DFT of length n.
    q = 1 + 8 * np.arange(n)
    folded = np.minimum(q % (8 * n), -q % (8 * n))
    sign = np.where(folded > 2 * n, -1.0, 1.0)
    folded = np.where(folded > 2 * n, 4 * n - folded, folded)
    k = np.arange(n)
    turn = np.exp(-2j * np.pi * (2 * k + 1) / (8 * n)) * math.sqrt(2 / n) * ((-1.0) ** k if sine else 1)
    z = by_rows(jnp.fft.rfft, x[..., (folded - 1) // 2] * jnp.asarray(sign, x.dtype))
    at = (2 * k + 1) % n
    turn = np.where(at > n // 2, turn.conj(), turn)
    full = z[..., np.minimum(at, n - at)]
    return (full * jnp.asarray(turn, full.dtype)).real


def _turns(n: int, dtype: jnp.dtype, power: int = 1) -> jax.Array:
    """exp(-i pi k / 2n) sqrt(2/n), k = 0..n/2, with 1/sqrt(n) at k = 0: what makes the orthonormal kind 2 of an FFT."""
    turns = np.exp(-0.5j * np.pi * np.arange(n // 2 + 1) / n) * math.sqrt(2 / n)
    turns[0] = n**-0.5
    return jnp.asarray(turns**power, jnp.result_type(dtype, jnp.complex64))


def _interleave(even: jax.Array, odd: jax.Array) -> jax.Array:
    """even[0], odd[0], even[1], ...; `odd` has as many entries or one less."""
    n = even.shape[-1] + odd.shape[-1]
    odd = jnp.pad(odd, [(0, 0)] * (odd.ndim - 1) + [(0, n % 2)])
    return jnp.stack([even, odd], -1).reshape(*even.shape[:-1], -1)[..., :n]
