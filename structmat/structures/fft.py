"""Fast Fourier transforms as products: lengths that are fast, convolutions, and what they cost."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp


def fft_flops(transforms: int, length: int, real: bool = False) -> int:
    """FLOPs of `transforms` FFTs: 5 N log2 N each for a complex one, half of it when one side is real."""
    return round(transforms * 5 * length * math.log2(length) / (2 if real else 1))


def fast_length(least: int) -> int:
    """The smallest length >= `least` with no prime factor above 5, which every FFT library has short code for."""
    return next(n for n in itertools.count(least) if _is_smooth(n))


def _is_smooth(n: int) -> bool:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n == 1


def convolve(x: jax.Array, kernel: jax.Array, length: int) -> jax.Array:
    """Circular convolution of x `(..., p)` with kernel `(q,)`, both padded with zeros to `length` >= p, q.

    Returns `(..., length)` in f32, f64 or their complex counterparts: narrower inputs are transformed in f32. Real
    inputs take real transforms.
    """
    dtype = jnp.result_type(x, kernel, jnp.float32)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.fft.ifft(jnp.fft.fft(x, n=length) * jnp.fft.fft(kernel, n=length), n=length)
    return jnp.fft.irfft(jnp.fft.rfft(x, n=length) * jnp.fft.rfft(kernel, n=length), n=length)


def convolve_flops(rows: int, length: int) -> int:
    """FLOPs of `convolve` with `rows` real vectors: two real transforms each, one of the kernel, and their product."""
    return 2 * fft_flops(rows, length, real=True) + fft_flops(1, length, real=True) + rows * (length // 2 + 1)
