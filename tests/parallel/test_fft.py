"""FFTs over a mesh: every device transforms its own rows, which the partitioner alone does not arrange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import structmat
from structmat.parallel import make_mesh, on_mesh
from structmat.parallel.report import collectives
from structmat.structures.fft import FEATURES, by_rows

TEXTS = ["toeplitz()", "circulant()", "dct()", "dct(kind=4)", "dct(kind=1, sine=True)", "fourier()", "hadamard()"]
N = 32


def loss_of(bound):
    return lambda params, x: jnp.sum(jnp.sin(jnp.abs(bound.matmul(params, x))))


@pytest.mark.parametrize("text", TEXTS)
def test_data_parallel_steps_move_gradients_only(text):
    """Split over 8 devices by rows, the gradient of x needs no communication and that of the parameters one reduction."""
    bound = structmat.parse(text).bind(N, N)
    params, x = bound.init(jax.random.key(0)), np.random.default_rng(0).normal(size=(16, 3, N)).astype(np.float32)
    grad = jax.grad(loss_of(bound), (0, 1))
    expected = jax.jit(grad)(params, x)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
    with on_mesh(mesh):
        compiled = (
            jax.jit(grad, out_shardings=(whole, rows))
            .lower(jax.device_put(params, whole), jax.device_put(x, rows))
            .compile()
        )
        got = compiled(jax.device_put(params, whole), jax.device_put(x, rows))
    assert set(collectives(compiled.as_text())) == ({"all-reduce"} if params else set())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


@pytest.mark.parametrize("spec", [P("data", None, "tensor"), P(None, "tensor", "data"), P("tensor", "data", None)])
def test_any_sharding_of_the_input_is_right(spec):
    bound = structmat.parse("toeplitz()").bind(N, N)
    params, x = bound.init(jax.random.key(0)), np.random.default_rng(0).normal(size=(8, 4, N)).astype(np.float32)
    grad = jax.grad(loss_of(bound), (0, 1))
    expected = jax.jit(grad)(params, x)
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert FEATURES in mesh.axis_names
    with on_mesh(mesh):
        got = jax.jit(grad)(params, jax.device_put(x, NamedSharding(mesh, spec)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)


@pytest.mark.parametrize("manual", [{"data", "fsdp", "tensor"}, {"data"}])
def test_inside_a_region_that_is_split_already(manual):
    x = np.random.default_rng(0).normal(size=(8, N)).astype(np.float32)
    with on_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        inner = lambda x: by_rows(jnp.fft.rfft, x)
        got = jax.jit(jax.shard_map(inner, in_specs=P("data"), out_specs=P("data"), axis_names=manual))(x)
    np.testing.assert_allclose(got, np.fft.rfft(x), atol=1e-4)
