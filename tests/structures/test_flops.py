"""The FLOP counter counts what it says, nested calls and scans included."""

import jax
import jax.numpy as jnp
import pytest

from tests.structures.flops import count_flops

A, B = jnp.ones((3, 4)), jnp.ones((4, 5))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda a, b: a @ b, 2 * 3 * 4 * 5),
        (lambda a, b: jax.jit(jnp.matmul)(a, b), 2 * 3 * 4 * 5),
        (lambda a, b: jnp.einsum("ij,jk->ki", a, b), 2 * 3 * 4 * 5),
        (lambda a, b: a * a + a, 3 * 4),
        (lambda a, b: 2.0 * a, 0),
        (lambda a, b: jax.lax.scan(lambda c, _: (c, c @ b), a, length=7)[1], 7 * 120),
        (lambda a, b: jax.vmap(lambda r: r @ b)(a), 2 * 3 * 4 * 5),
        (lambda a, b: jnp.fft.fft(a), 3 * 5 * 4 * 2),
        (lambda a, b: jnp.fft.rfft(a), 3 * 5 * 4 * 2 / 2),
        (lambda a, b: jnp.fft.irfft(a, n=8), 3 * 5 * 8 * 3 / 2),
    ],
)
def test_counts(fn, expected):
    assert count_flops(fn, A, B) == expected


def test_refuses_unknown_lengths():
    with pytest.raises(NotImplementedError, match="while"):
        count_flops(lambda a: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, a), A)
