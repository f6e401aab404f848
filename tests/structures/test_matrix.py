"""`Matrix`: a structure with its parameters, at a prompt and under transformations."""

import base64
import re
import struct
import xml.etree.ElementTree
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat import Matrix, StructureError
from structmat.structures import FAMILIES, random
from tests.marks import thinned

W = np.random.default_rng(0).normal(size=(12, 18)).astype(np.float32)
TEXTS = ["low_rank(rank=3)", "monarch(blocks=2)", "low_rank(rank=2) + kronecker()", "transpose(tensor_train(rank=2))"]
PARAMETER_FREE = [f"{name}()" for name in ("identity", "permutation") if name in FAMILIES]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("text", thinned(TEXTS, 2))
def test_products_and_transpose(text):
    m = jax.jit(lambda w: structmat.project(w, text))(W)
    dense = np.asarray(m.materialize())
    x, y = np.ones((5, 12), np.float32), np.ones((2, 3, 18), np.float32)
    for left in (x, jnp.asarray(x), x[0]):
        product = left @ m
        assert isinstance(product, jax.Array), "numpy on the left defers"
        close(product, left @ dense)
    close(y @ m.T, y @ dense.T)
    close(m.T.materialize(), dense.T)
    assert m.T.T.bound == m.bound and m.T.shape == (18, 12) and m.shape == (12, 18)
    assert m.T.params is m.params


def test_is_a_pytree():
    m = structmat.project(W, "low_rank(rank=3)")
    leaves, tree = jax.tree.flatten(m)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).bound == m.bound
    doubled = jax.tree.map(lambda p: 2 * p, m)
    close(doubled.materialize(), 4 * m.materialize())
    close(jax.jit(lambda m, x: x @ m)(m, W.T), W.T @ np.asarray(m.materialize()))
    grad = jax.jit(jax.grad(lambda m: jnp.sum(m.materialize() ** 2)))(m)
    assert isinstance(grad, Matrix) and grad.params["a"].shape == m.params["a"].shape
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), m)
    close(jax.vmap(lambda m: jnp.ones(12) @ m)(stack)[1], 4 * (np.ones(12) @ m))


def test_sums():
    a, b, c = (structmat.project(W, t) for t in ("low_rank(rank=3)", "monarch(blocks=2)", "kronecker()"))
    both = a + b
    close(both.materialize(), a.materialize() + b.materialize())
    assert both.structure == structmat.parse(f"{a.structure} + {b.structure}")
    flat = both + (c + a)
    assert [t.structure.name for t in flat.bound.terms] == ["low_rank", "monarch", "kronecker", "low_rank"]
    close(np.eye(12, dtype=np.float32) @ flat, 2 * a.materialize() + b.materialize() + c.materialize())
    assert flat.cost.params == 2 * a.cost.params + b.cost.params + c.cost.params


def test_says_what_it_is():
    m = structmat.project(W, "low_rank(rank=3)")
    assert repr(m) == "Matrix(low_rank(rank=3), shape=(12, 18), dtype=float32, params=41.7%, bits=41.7% of dense)"
    sparse = structmat.project(W, "random_sparse(density=0.25, select='magnitude')")
    assert repr(sparse).endswith("params=25.0%, bits=50.0% of dense)"), "an index costs as much as its value"
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), m)
    assert repr(half).endswith("dtype=bfloat16, params=41.7%, bits=41.7% of dense)"), "of dense in the same dtype"
    assert m.cost == m.bound.cost(1) and m.dtype == jnp.float32
    exact = np.linalg.svd(W, compute_uv=False)
    assert float(m.error(W)) == pytest.approx(np.linalg.norm(exact[3:]) / np.linalg.norm(exact), rel=1e-5)


def test_random_draws_from_the_init():
    m = random("low_rank(rank=3)", 12, 18, jax.random.key(0), jnp.bfloat16)
    assert m.dtype == jnp.bfloat16
    again = m.bound.init(jax.random.key(0), jnp.bfloat16)
    assert all(bool((m.params[n] == again[n]).all()) for n in again)


def test_mixed_sums_have_a_dtype():
    """Index leaves do not count."""
    assert structmat.project(W, "low_rank(rank=1) + random_sparse(density=0.25)").dtype == jnp.float32


def test_scaling_and_differences():
    m, v = structmat.project(W, "low_rank(rank=3)"), structmat.project(W, "monarch(blocks=2)")
    dense = np.asarray(m.materialize())
    for twice in (2 * m, m * 2, np.float32(2) * m, jnp.float32(2) * m, m / 0.5, 4.0 * m * 0.5, -(-2 * m)):
        assert str(twice.structure) == str(structmat.parse("scaled(low_rank(rank=3), s=2.0)"))
        assert twice.params is m.params
        close(np.eye(12, dtype=np.float32) @ twice, 2 * dense)
    assert (2 * m / 2).bound == m.bound, "factors are folded, and one is none"
    close((m - v).materialize(), dense - v.materialize())
    close((-m).materialize(), -dense)


def test_products_of_matrices():
    a = structmat.project(W, "low_rank(rank=3)")
    b = structmat.project(W.T[:, :6], "kronecker()")
    ab = a @ b
    assert ab.shape == (12, 6) and isinstance(ab, Matrix)
    close(ab.materialize(), a.materialize() @ b.materialize())
    close(W.T @ ab, (W.T @ a) @ b)
    assert ab.structure.bind(12, 6) == ab.bound, "the text names it"
    close((ab @ ab.T).T.materialize(), (ab @ ab.T).materialize())


def test_elementwise_products():
    a, b = structmat.project(W, "low_rank(rank=3)"), structmat.project(W, "kronecker()")
    ab = a * b
    close(ab.materialize(), np.asarray(a.materialize()) * np.asarray(b.materialize()))
    close(np.eye(12, dtype=np.float32) @ ab, ab.materialize())
    assert str(ab.structure) == str(structmat.parse(f"{a.structure} * {b.structure}")) and ab.params["1"] is b.params


def test_leaves_and_spectrum():
    m = structmat.project(W, "low_rank(rank=2) + random_sparse(density=0.25, select='magnitude')")
    assert list(m.leaves) == ["0/a", "0/b", "1/values", "1/rows"]
    assert m.leaves["1/rows"] == ((18, 3), "int32", False, None)
    values = m.leaves["1/values"]
    assert values.trainable and values.rms == pytest.approx(np.sqrt(np.mean(np.square(m.params["1"]["values"]))))
    np.testing.assert_allclose(m.spectrum(), np.linalg.svd(m.materialize(), compute_uv=False), rtol=1e-5)


@pytest.mark.parametrize("text", ["diagonal()", "random_sparse(density=0.25)", *PARAMETER_FREE])
def test_every_matrix_shows_itself(text):
    m = random(text, 16, 16, jax.random.key(0))
    assert m.dtype == jnp.float32 and f"Matrix({m.structure.short()}, shape=(16, 16), dtype=float32" in repr(m)
    page = m._repr_html_()
    assert all(f"<td>{name}</td>" in page for name in m.leaves)
    picture = decode_png(base64.b64decode(re.search(r'base64,([^"]+)"', page)[1]))
    size = np.abs(np.asarray(m.materialize()))
    assert picture.shape == (16, 16)
    assert (picture[size == 0] == 255).all() and picture[np.unravel_index(size.argmax(), size.shape)] == 0


def test_large_matrices_and_text_in_html():
    m = random("low_rank(rank=1)", 4, 513, jax.random.key(0))
    assert (
        "<img" not in m._repr_html_() and "<img" in random("low_rank(rank=1)", 4, 512, jax.random.key(0))._repr_html_()
    )
    page = random("n_m_sparse(1, 2, axis='in')", 4, 4, jax.random.key(0))._repr_html_()
    assert "&lt;" not in page and "n_m_sparse" in page
    xml.etree.ElementTree.fromstring(page)


def decode_png(data):
    """Grey levels of an unfiltered 8-bit PNG, every chunk's checksum verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    columns, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, columns + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: np.ones((5, 11)) @ m, r"cannot multiply an array of shape \(5, 11\) with a matrix of shape \(12, 18\)"),
        (lambda m: np.float32(3) @ m, "cannot multiply an array of shape"),
        (lambda m: m + m.T, r"cannot add matrices of shapes \(12, 18\) and \(18, 12\)"),
        (lambda m: m * m.T, r"cannot multiply matrices of shapes \(12, 18\) and \(18, 12\) elementwise"),
        (lambda m: m @ m, r"cannot multiply matrices of shapes \(12, 18\) and \(12, 18\)"),
        (lambda m: m @ np.ones(18), r"W @ an array of shape \(18,\): rows come first here, write x @ W.T"),
        (lambda m: np.ones(3) * m, r"scaled by one real number known before tracing, got shape \(3,\)"),
        (lambda m: jax.jit(lambda s: (s * m).params)(2.0), "scaled by one real number known before tracing, got JitTracer"),
        (lambda m: 2j * m, "scaled by one real number known before tracing, got 2j"),
        (lambda m: m * float("nan"), "scaled by one real number known before tracing, got nan"),
        (lambda m: 0 * m, "s must not be 0"),
        (lambda m: m.error(W.T), r"cannot project an array of shape \(18, 12\); expected \(12, 18\)"),
        (lambda m: structmat.project(np.ones(3), "dense()"), r"project needs a matrix, got an array of shape \(3,\)"),
        (lambda m: structmat.project(W, "low_rank(rank=13)"), "rank=13 does not fit a weight of shape"),
    ],
)  # fmt: skip
def test_refusals(act, message):
    with pytest.raises(StructureError, match=message):
        act(structmat.project(W, "low_rank(rank=3)"))


def test_an_integer_matrix_is_projected_in_floats():
    w = jnp.arange(64).reshape(8, 8)
    assert float(structmat.project(w, "low_rank(rank=2)").error(w)) < 1e-5
