"""The low-rank product: XLA's path against the definition, the rule, and bad input; the kernel is in test_gpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import CHIPS, KernelError
from pallas_kernels.low_rank import choose, low_rank, reference


def problem(*lead, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in ((*(lead or (2, 3)), 8), (3, 8), (3, 5))]


def test_xla_equals_the_reference_and_is_transposable():
    x, a, b = problem()
    np.testing.assert_allclose(low_rank(x, a, b), reference(x.reshape(6, 8), a, b).reshape(2, 3, 5), 1e-5)
    back = jax.linear_transpose(lambda x: low_rank(x, a, b), x)(jnp.ones((2, 3, 5)))[0]
    np.testing.assert_allclose(back, jnp.ones((2, 3, 5)) @ (a.T @ b).T, 1e-5, 1e-5)


@pytest.mark.parametrize("lead", [(1,), (4,), (0,), (2, 1, 3)])
def test_gradients_in_double_precision(lead):
    with jax.enable_x64(True):
        x, a, b = problem(*lead, dtype=jnp.float64)
        flat = lambda x, a, b: reference(x.reshape(-1, 8), a, b).reshape(*lead, 5)
        (y, pull), (expected, want) = jax.vjp(low_rank, x, a, b), jax.vjp(flat, x, a, b)
        for got, right in zip((y, *pull(jnp.cos(y))), (expected, *want(jnp.cos(y)))):
            np.testing.assert_allclose(got, right, atol=1e-12)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "cpu"])
def test_it_is_left_to_xla_elsewhere(chip):
    choice = choose(64, (4096, 128, 4096), jnp.bfloat16, CHIPS[chip])
    assert choice.implementation == "xla" and choice.flop_reduction == 16
    said = "cpu runs the XLA path" if chip == "cpu" else "XLA fuses both products"
    assert choice.unsupported.startswith(said) and said in choice.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a=jnp.ones((4, 8))), r"a must be \(r, n\) and b \(r, m\), got \(4, 8\) and \(3, 5\)"),
        (dict(b=jnp.ones(3)), r"a must be \(r, n\)"),
        (dict(x=jnp.ones((2, 9))), r"x of shape \(2, 9\) must end in 8"),
        (dict(x=jnp.float32(1)), r"x of shape \(\) must end in 8"),
        (dict(implementation="palas"), "did you mean 'pallas'"),
    ],
)
def test_bad_input(change, message):
    held = dict(x=jnp.ones((2, 8)), a=jnp.ones((3, 8)), b=jnp.ones((3, 5))) | change
    with pytest.raises(KernelError, match=message):
        low_rank(held.pop("x"), held.pop("a"), held.pop("b"), **held)
