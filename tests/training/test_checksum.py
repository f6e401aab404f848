"""Array checksums: independent of layout, sensitive to every bit and to order, for every dtype a state may hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from structmat.training import checksum

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool", "complex64", "float8_e4m3fn")


def sums(*arrays):
    names = [str(i) for i in range(len(arrays))]
    return list(checksum.finish(names, checksum.start(dict(zip(names, arrays)))).values())


def array(dtype, shape=(8, 6), seed=0):
    words = np.random.default_rng(seed).integers(0, 2, (*shape, 64), np.uint8)
    if dtype == "bool":
        return jnp.asarray(words[..., 0] > 0)
    raw = np.packbits(words[..., : 8 * jnp.dtype(dtype).itemsize], axis=-1)
    return jnp.asarray(raw.view(jnp.dtype(dtype))[..., 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_anywhere_changes_the_sum(dtype):
    x = np.asarray(array(dtype))
    changed = []
    for position, bit in ((0, 0), (17, 3), (47, 7)):
        y = x.copy()
        raw = y.reshape(-1).view(np.uint8)
        raw[position * x.dtype.itemsize] ^= 1 if dtype == "bool" else 1 << bit
        changed.append(jnp.asarray(y))
    original, *others = sums(jnp.asarray(x), *changed)
    assert len({original, *others}) == 4
    assert checksum.supported(x.dtype)


def test_order_shape_sign_of_zero_and_nan_payload_count():
    x = jnp.arange(12, dtype=jnp.float32)
    base, swapped, moved = sums(x, x.at[3].set(4).at[4].set(3), jnp.roll(x, 1))
    assert len({base, swapped, moved}) == 3
    zero, minus = sums(jnp.float32(0.0), jnp.float32(-0.0))
    assert zero != minus
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert len(set(sums(*(jnp.asarray(n) for n in nans)))) == 2


def test_independent_of_layout():
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    results = set()
    for shape, spec in (
        ((1, 1), (None, None)),
        ((2, 2), ("a", "b")),
        ((4, 1), ("a", None)),
        ((2, 2), (("a", "b"), None)),
    ):
        mesh = jax.make_mesh(
            shape,
            ("a", "b"),
            devices=jax.devices()[: shape[0] * shape[1]],
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        results.update(sums(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))))
    assert len(results) == 1


def test_value_is_fixed():
    """Golden: checkpoints written by an older version must still verify."""
    assert sums(jnp.arange(10, dtype=jnp.float32), jnp.int32(7), jnp.zeros((0, 3))) == GOLDEN


GOLDEN = ["2052193d19f0e4ea", "2703de932900f05e", "0000000000000000"]


def test_unsupported():
    assert not checksum.supported(jax.random.key(0).dtype)
    assert not checksum.supported(jnp.dtype(jnp.int4))
