"""Exact checksums of arrays, computed where the arrays live and independent of how they are sharded.

Every element's bits are mixed with its position by a bijection of 32-bit words and summed modulo 2^32, twice with
different salts. Integer sums do not depend on order, so any layout gives the same 64 bits; one changed word always
changes both sums, and moved elements change them but for one chance in 2^64.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SALTS = (0x9E3779B9, 0x85EBCA6B)


def start(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Dispatches the checksums of `arrays` as one program; uint32 (len(arrays), 2), replicated, in the mapping's order."""
    leaves = list(arrays.values())
    meshes = [a.sharding.mesh for a in leaves if isinstance(a.sharding, NamedSharding)]
    return _program(NamedSharding(meshes[0], PartitionSpec()) if meshes else None)(leaves)


def finish(names: Sequence[str], sums: jax.Array) -> dict[str, str]:
    """Waits for `start` and returns 16 hex digits per name."""
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(names, np.asarray(sums).tolist())}


def supported(dtype: np.dtype) -> bool:
    """Booleans, integers, floats and complex numbers of whole bytes."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return True
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits >= 8
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits >= 8
    return jnp.issubdtype(dtype, jnp.complexfloating)


@lru_cache(maxsize=8)
def _program(out: NamedSharding | None):
    return jax.jit(lambda leaves: jnp.stack([_sums(x) for x in leaves]), out_shardings=out)


def _sums(x: jax.Array) -> jax.Array:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return salted(words, position)


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32; 8-byte elements give a trailing axis of 2, complex numbers a leading one."""
    if jnp.issubdtype(x.dtype, jnp.bool_):
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(jax.lax.real(x)), _words(jax.lax.imag(x))])
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def salted(words: jax.Array, position: jax.Array) -> jax.Array:
    """uint32 [len(SALTS)]: the sum over words, modulo 2**32, of a hash of each with its place, once for every salt."""
    return jnp.stack([jnp.sum(_mix(words ^ _mix(position + np.uint32(s))), dtype=jnp.uint32) for s in SALTS])


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser, a bijection."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
