"""Kernels under a mesh: parts per device equal the whole product, and the compiled programs gather nothing."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import KernelError, asking, only_xla
from pallas_kernels.block_sparse import block_sparse
from structmat.nn import StructuredDense, sharded
from structmat.parallel import make_mesh, topology_mesh
from structmat.parallel.aot import compile_for, placed
from structmat.parallel.rules import DEFAULT_RULES, on_mesh, shardings
from structmat.structures import parse
from tests.marks import thinned
from tests.structures.cases import split

N = 32
SUM = "low_rank(rank=3) + block_sparse(block=4, density=0.25)"
SPLIT = {  # text -> (in axes, out axes) whose product is split over the tensor axis
    "low_rank(rank=3)": [("embed", "mlp"), ("mlp", "embed")],
    "block_sparse(block=4, density=0.5)": [("embed", "mlp")],
    "block_low_rank(in_blocks=4, out_blocks=8, rank=2)": [("embed", "mlp"), ("mlp", "embed")],
    "monarch(blocks=4)": [("mlp", "embed")],
    "block_diagonal(blocks=8)": [("embed", "mlp"), ("mlp", "embed"), ("mlp", "mlp")],
    SUM: [("embed", "mlp")],
    "kronecker(terms=2)": [("embed", "embed")],
}


PAIRS = [(t, a, "data") for t, pairs in SPLIT.items() for a in pairs]


@pytest.mark.parametrize(("text", "axes", "first"), thinned([*PAIRS, (*PAIRS[0][:2], "replica")], 2))
def test_parts_equal_the_whole(text, axes, first):
    """Forward and every gradient, weights split over tensor and fsdp, rows over replica or data and fsdp."""
    bound = parse(text).bind(N, N)
    params = bound.init(jax.random.key(0))
    x, g = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 6, N)), jnp.float32) for i in range(2))
    floats, join = split(params)

    def step(product, floats, x):
        y, pull = jax.vjp(lambda f, x: product(join(f), x), floats, x)
        return y, pull(g)

    expected = jax.jit(lambda f, x: step(bound.matmul, f, x))(floats, x)
    with on_mesh(make_mesh({first: 2, "fsdp": 2, "tensor": 2}, jax.devices())):
        specs = sharded.site_specs(bound, x.shape, *axes, DEFAULT_RULES)
        assert specs is not None and specs[1][0] == (first, "fsdp")
        assert ("tensor" in str(specs[0])) == (axes != ("embed", "embed"))
        got = jax.jit(lambda f, x: step(lambda p, x: sharded.run(bound, p, x, specs), f, x))(floats, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), got, expected)


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("block_sparse(block=4, density=0.5)", ("heads", "embed")),
        ("monarch(blocks=4)", ("embed", "mlp")),
        ("kronecker(terms=1)", ("embed", "mlp")),
        ("block_low_rank(in_blocks=4, out_blocks=1, rank=2)", ("embed", "mlp")),
    ],
)
def test_sides_a_family_does_not_take_in_parts(text, axes):
    """None, to be left to the compiler; a side no leaf names is no obstacle."""
    with on_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())):
        specs = sharded.site_specs(parse(text).bind(N, N), (4, N), *axes, DEFAULT_RULES)
    if axes == ("heads", "embed"):
        assert specs[1] == PartitionSpec(("data", "fsdp"), None) and specs[3] == ()
    else:
        assert specs is None


def test_weights_are_whole_within_a_replica_before_use():
    """But for the sides that tensor splits; a dimension it does not divide stays whole too. Else they are left alone."""
    bound = parse("low_rank(rank=3)").bind(N, N + 1)
    params = bound.init(jax.random.key(0))
    held = {("data", "mlp"): N // 4, ("replica", "mlp"): N // 2, ("replica", "embed"): N}
    for (first, side), columns in held.items():
        gather = lambda p: sharded.within_replica(bound, p, side, "heads")  # noqa: B023
        assert gather(params) is params
        mesh = make_mesh({first: 2, "fsdp": 2, "tensor": 2}, jax.devices())
        split = jax.device_put(params, {n: NamedSharding(mesh, PartitionSpec(None, None)) for n in params})
        split["a"] = jax.device_put(params["a"], NamedSharding(mesh, PartitionSpec(None, ("tensor", "fsdp"))))
        with on_mesh(mesh):
            got = jax.jit(gather)(split)
        assert {n: a.addressable_shards[0].data.shape for n, a in got.items()} == {"a": (3, columns), "b": (3, N + 1)}
        jax.tree.map(np.testing.assert_array_equal, got, params)


def test_a_kernel_is_not_left_to_the_compiler():
    x, values, rows = jnp.ones((8, 8)), jnp.ones((2, 1, 4, 4)), jnp.zeros((2, 1), jnp.int32)
    with on_mesh(make_mesh({"data": 8}, jax.devices())), pytest.raises(KernelError, match=r"inside jax.shard_map over"):
        block_sparse(x, values, rows, implementation="pallas")


def test_what_a_product_would_run_can_be_asked():
    bound = parse("block_sparse(block=4, density=0.5)").bind(N, N)
    with asking() as asked:
        jax.eval_shape(bound.matmul, bound.init(jax.random.key(0)), jnp.ones((3, N)))
    ((op, choice),) = asked
    assert op == "block_sparse" and choice.implementation == "xla" and "cpu runs the XLA path" in choice.reason
    with only_xla():
        assert bound.matmul(bound.init(jax.random.key(0)), jnp.ones((3, N))).shape == (3, N)


# -- programs for TPUs -----------------------------------------------------------------------------------------------

KERNELS = {
    "block_sparse(block=128, density=0.25)": (
        "block_sparse_forward",
        "block_sparse_backward_x",
        "block_sparse_backward_values",
    ),
    "block_low_rank(in_blocks=8, out_blocks=8, rank=128)": ("monarch_forward", "monarch_backward"),
    "block_diagonal(blocks=16)": ("block_diagonal_forward", "block_diagonal_backward"),
    "low_rank(rank=128) + block_sparse(block=128, density=0.125)": ("low_rank_plus_block_sparse_forward",),
}
MESHES = {"one slice": ({"data": 2, "fsdp": 1, "tensor": 4}, 1), "two slices": ({"data": 4, "fsdp": 1, "tensor": 4}, 2)}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("slices", MESHES)
@pytest.mark.parametrize("text", KERNELS)
def test_kernels_are_in_the_program_and_nothing_is_gathered(text, slices):
    """A column-parallel layer of width 4096 on v5e:2x4: no all-gather forward; backward none beyond a weight's own part."""
    spec, count = MESHES[slices]
    mesh = topology_mesh("v5e:2x4", spec, count)
    layer = StructuredDense(4096, text, in_axes="embed", out_axes="mlp", dtype=jnp.bfloat16, use_bias=False)
    at = lambda *axes: jax.ShapeDtypeStruct(
        (16, 1024, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )
    x, g = at(("data", "fsdp"), None, None), at(("data", "fsdp"), None, "tensor")
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
    variables = placed(boxed, shardings(mesh, boxed))
    forward = compile_for(mesh, layer.apply, variables, x)
    assert "all-gather" not in forward.collectives, forward.collectives

    def step(variables, x, g):
        rest = {k: v for k, v in variables.items() if k != "params"}
        y, pull = jax.vjp(lambda p, x: layer.apply({"params": p, **rest}, x), variables["params"], x)
        return y, pull(g)

    program = compile_for(mesh, step, variables, x, g)
    text_of = program.compiled.as_text()
    called = set(re.findall(r"%?([a-z_]+)[.\d]* = [^\n]*custom_call_target=\"tpu_custom_call\"", text_of))
    assert called >= set(KERNELS[text]), called
    part = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(nn.unbox(boxed)["params"])) // 4
    gathered = program.collectives.get("all-gather")
    assert gathered is None or gathered.bytes <= part, program.collectives
