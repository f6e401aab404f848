"""Fast Fourier transforms as products: over a mesh, lengths that are fast, convolutions, and what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.chips import current_chip

FEATURES = "tensor"
"""The mesh axis that splits features rather than rows (`structmat.parallel.mesh`)."""


def by_rows(transform: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """transform(x) of a jnp.fft function over the last axis of x `(..., d)`, each device on its own rows.

    Left to itself the SPMD partitioner gathers the whole batch before every FFT (openxla/xla#24). Under an ambient mesh
    the first axis is therefore split by hand over as many mesh axes as divide it, in order, all but the one that splits
    features, over which the work is repeated; without a mesh this is transform(x).
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {a for a, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    if not free:
        return transform(x)
    split: list[str] = []
    for name in mesh.axis_names if x.ndim > 1 else ():
        if name in free - {FEATURES} and x.shape[0] % math.prod(mesh.shape[a] for a in (*split, name)) == 0:
            split.append(name)
    local = _row_major(transform) if current_chip().platform == "cpu" else transform
    return jax.jit(jax.shard_map(local, in_specs=P(tuple(split)), out_specs=P(tuple(split)), axis_names=free))(x)


def _row_major(transform: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The CPU compiler may lay out an FFT between collectives in a way its own runtime then refuses."""
    fixed = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return lambda x: fixed(transform(fixed(x)))


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
        forward, back = jnp.fft.fft, jnp.fft.ifft
    else:
        forward, back = jnp.fft.rfft, jnp.fft.irfft
    spectrum = by_rows(lambda x: forward(x, n=length), x) * forward(kernel, n=length)
    return by_rows(lambda z: back(z, n=length), spectrum)


def convolve_flops(rows: int, length: int) -> int:
    """FLOPs of `convolve` with `rows` real vectors: two real transforms each, one of the kernel, and their product."""
    return 2 * fft_flops(rows, length, real=True) + fft_flops(1, length, real=True) + rows * (length // 2 + 1)
