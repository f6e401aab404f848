"""Closed-form and published values: errors on analytic matrices, exact members, parameter counts of papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import structmat

N, M = 64, 8
I, J = np.indices((N, N))
MATRICES = {
    "hilbert": 1 / (1.0 + I + J),
    "ar1": 0.5 ** np.abs(I - J),
    "distance": np.abs(I - J).astype(float),
    "tril": np.tril(np.ones((N, N))),
    "hadamard": scipy.linalg.hadamard(N).astype(float),
    "identity": np.eye(N),
    "rank one": np.outer(np.cos(np.arange(N)), 1 + np.arange(N)),
    "kronecker": np.kron(*np.random.default_rng(0).normal(size=(2, M, M))),
}


def error(text, w):
    """Relative Frobenius error of the projection, in double precision."""
    with jax.enable_x64(True):
        return float(jax.jit(lambda w: structmat.project(w, text).error(w))(jnp.asarray(w)))


def block(rank):
    return f"block_tensor_train(rank={rank})"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("monarch(blocks=8)", "hilbert", 0.1000533045),
        ("monarch(blocks=8)", "ar1", 0.2418519276),
        ("monarch(blocks=8)", "tril", 0.1787835799),
        (block(1), "hilbert", 0.1000533045),
        (block(2), "hilbert", 0.0045329152),
        (block(1), "ar1", 0.2418519276),
        (block(2), "ar1", 0.0125052031),
        (block(4), "ar1", 0),
        (block(2), "tril", 0),
        (block(3), "distance", 0),
        ("low_rank(rank=8)", "ar1", 0.662),
        ("low_rank(rank=16)", "ar1", 0.433),
        ("kronecker()", "hilbert", 0.2905214457),
        ("kronecker(terms=2)", "hilbert", 0.0240676453),
        ("kronecker(terms=4)", "hilbert", 5.3075e-05),
        ("kronecker()", "ar1", 0.2420285372),
        ("kronecker(terms=2)", "ar1", 0.1709713055),
        ("kronecker(terms=3)", "ar1", 0),
        ("tensor_train(rank=2)", "ar1", 0.1709713055),
        ("tensor_train(rank=2)", "hilbert", 0.0240676453),
        *((text, name, 0) for text in ("monarch(blocks=8)", "kronecker()") for name in ("hadamard", "identity", "kronecker")),
        ("monarch(blocks=8)", "rank one", 0),
    ],
)  # fmt: skip
def test_reference_errors(text, name, expected):
    digits = {0: 12, 0.662: 3, 0.433: 3, 5.3075e-05: 9}.get(expected, 10)
    assert error(text, MATRICES[name]) == pytest.approx(expected, abs=0.6 * 10.0**-digits)


def test_monarch_and_rank_one_slices_are_one_class():
    w = np.random.default_rng(1).normal(size=(N, N))
    assert error("monarch(blocks=8)", w) == pytest.approx(error(block(1), w), abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(16, 4), (64, 8)])
def test_fourier(n, m):
    """The unitary DFT is sqrt(1 - 1/m) away from Monarch, and a member once the digits of its inputs are swapped."""
    dft = (scipy.linalg.dft(n) / np.sqrt(n)).astype(np.complex64)
    found = structmat.project(jnp.asarray(dft), f"monarch(blocks={m})")
    assert found.dtype == jnp.complex64
    assert float(found.error(dft)) == pytest.approx(np.sqrt(1 - 1 / m), abs=1e-5)
    member = dft.reshape(m, m, n).swapaxes(0, 1).reshape(n, n)
    assert float(structmat.project(jnp.asarray(member), f"monarch(blocks={m})").error(member)) < 1e-5


def gpt2(width, layers, vocabulary=50257, context=1024):
    """Parameters of a GPT-2 whose q, k, v, o and FFN weights are Monarch with 4 blocks; biases and norms left out."""
    count = lambda i, o: structmat.parse("monarch(blocks=4)").bind(i, o).params
    block = 4 * count(width, width) + count(width, 4 * width) + count(4 * width, width)
    return layers * block + (vocabulary + context) * width


@pytest.mark.parametrize(("width", "layers", "millions"), [(768, 12, 71.2), (1024, 24, 165.8)])
def test_gpt2_parameters(width, layers, millions):
    """72M and 165M in the paper's Table 2."""
    assert gpt2(width, layers) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("text", "sizes", "params", "macs"),
    [
        ("dense()", (64, 64), 64**2, 64**2),
        ("low_rank(rank=4)", (64, 64), 2 * 4 * 64, 2 * 4 * 64),
        ("monarch(blocks=4)", (64, 64), 2 * 64**2 // 4, 2 * 64**2 // 4),
        ("monarch(blocks=8)", (64, 64), 2 * 64 * 8, 2 * 64 * 8),
        ("block_tensor_train(rank=3)", (64, 64), 2 * 3 * 64 * 8, 2 * 3 * 64 * 8),
        ("kronecker()", (64, 64), 2 * 64, 2 * 64 * 8),
        ("kronecker(terms=3)", (64, 64), 3 * 2 * 64, 3 * 2 * 64 * 8),
        ("tensor_train(rank=3)", (64, 64), 2 * 3 * 64, 2 * 3 * 64 * 8),
        ("tensor_train(rank=2, cores=3)", (64, 64), (2 + 4 + 2) * 16, (2 + 4 + 2) * 16 * 16),
        ("block_diagonal(blocks=4)", (64, 32), 64 * 32 // 4, 64 * 32 // 4),
    ],
)
def test_costs_of_the_cards(text, sizes, params, macs):
    cost = structmat.parse(text).bind(*sizes).cost(1)
    assert (cost.params, cost.flops) == (params, 2 * macs)


def test_kronecker_takes_the_cheaper_order():
    """MACs per token and term min(n2 m1 (n1 + m2), n1 m2 (n2 + m1))."""
    for (n1, n2), (m1, m2) in itertools.product(((2, 12), (12, 2), (4, 6)), ((3, 12), (12, 3), (6, 6))):
        bound = structmat.parse(f"kronecker(in_factors=({n1}, {n2}), out_factors=({m1}, {m2}))").bind(24, 36)
        assert bound.cost(1).flops == 2 * min(n2 * m1 * (n1 + m2), n1 * m2 * (n2 + m1))
        assert bound.last == ("b" if n2 * m1 * (n1 + m2) <= n1 * m2 * (n2 + m1) else "a")
