"""What a program sends: the parser on known text, and the block-low-rank products on 8 devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from structmat.nn import StructuredDense
from structmat.parallel import Traffic, batch_sharding, collectives, make_mesh, placed, shardings, spec_for
from structmat.structures import parse

HLO = """\
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %a)
}

%wide.region_1.8 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = bf16[4,2]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%region_2.9 (p: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%left (p: f32[8]) -> f32[8] {
  ROOT %one = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%right-1 (p: f32[8]) -> f32[8] {
  ROOT %two = f32[8]{0} collective-permute(%p), source_target_pairs={{1,0}}
}

%unused (p: f32[8]) -> f32[8] {
  ROOT %never = f32[8]{0} all-reduce(%p), to_apply=%add
}

ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%region_2.9, body=%wide.region_1.8, backend_config={"known_trip_count":{"n":"3"}}
  %br = f32[8]{0} conditional(%i, %p, %p), branch_computations={%left, %right-1}
  %both = (f32[8]{0}, pred[16]{0}) all-reduce(%p, %q), to_apply=%add
  %ags = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  %agd = f32[32]{0} all-gather-done(%ags)
  %cps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p)
  %rs = f8e4m3fn[16]{0} reduce-scatter(%p), to_apply=%add
  ROOT %a2a = s8[5]{0} all-to-all(%p), metadata={op_name="all-reduce(not one)"}
}
"""


def test_parser_on_known_text():
    assert collectives(HLO) == {
        "all-reduce": Traffic(3 + 1, 3 * 16 + 32 + 16),
        "all-gather": Traffic(1, 128),
        "reduce-scatter": Traffic(1, 16),
        "all-to-all": Traffic(1, 5),
        "collective-permute": Traffic(3, 96),
    }
    assert collectives("HloModule empty") == {}


D, ROWS = 256, 64
BLOCKED = "block_low_rank(in_blocks=8, out_blocks=8, rank=4)"
PAPER = "monarch(blocks=8)"


def arguments(mesh, text, in_axes, out_axes):
    bound = parse(text).bind(D, D)
    put = lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, jnp.float32, sharding=NamedSharding(mesh, spec_for(mesh, leaf.axes, leaf.shape))
    )
    return bound, jax.tree.map(put, bound.leaves(in_axes, out_axes))


def sent(mesh, fn, args, x_spec, y_spec):
    x = jax.ShapeDtypeStruct((ROWS, 3, D), jnp.float32, sharding=NamedSharding(mesh, x_spec))
    compiled = jax.jit(fn, out_shardings=NamedSharding(mesh, y_spec)).lower(*args, x).compile()
    return collectives(compiled.as_text())


WHOLE, PARTS = P("data", None, None), P("data", None, "tensor")
OUTPUT = ROWS // 2 * 3 * D * 4  # bytes on one device of the two rows of the mesh


@pytest.mark.parametrize(
    ("text", "axes", "x", "y", "want"),
    [
        (BLOCKED, ("embed", "mlp"), WHOLE, PARTS, {}),
        (BLOCKED, ("mlp", "embed"), PARTS, WHOLE, {"all-reduce": Traffic(1, OUTPUT)}),
        (PAPER, ("embed", "mlp"), WHOLE, PARTS, {"all-to-all": 1}),
        ("dense()", ("embed", "mlp"), WHOLE, PARTS, {}),
        ("dense()", ("mlp", "embed"), PARTS, WHOLE, {"all-reduce": Traffic(1, OUTPUT)}),
        ("low_rank(rank=8)", ("embed", "mlp"), WHOLE, PARTS, {}),
        ("low_rank(rank=8)", ("mlp", "embed"), PARTS, WHOLE, {"all-reduce": Traffic(1, ROWS // 2 * 3 * 8 * 4)}),
    ],
)
def test_one_product(text, axes, x, y, want):
    mesh = make_mesh({"data": 2, "tensor": 4})
    bound, params = arguments(mesh, text, *axes)
    got = sent(mesh, bound.matmul, [params], x, y)
    assert got.keys() == want.keys()
    for kind, traffic in want.items():
        assert got[kind] == traffic if isinstance(traffic, Traffic) else got[kind].count == traffic


def test_first_factor_by_input_second_by_output_is_one_all_to_all():
    mesh = make_mesh({"data": 2, "tensor": 4})
    bound, by_in = arguments(mesh, BLOCKED, "mlp", "embed")
    _, by_out = arguments(mesh, BLOCKED, "embed", "mlp")
    got = sent(mesh, bound.matmul, [{"R": by_in["R"], "L": by_out["L"]}], PARTS, PARTS)
    assert {kind: t.count for kind, t in got.items()} == {"all-to-all": 1}


@pytest.mark.parametrize("text", [BLOCKED, "dense()", "low_rank(rank=8)"])
def test_ffn_is_one_all_reduce(text):
    """Through the modules and the default rules, as a model would."""
    mesh = make_mesh({"data": 2, "tensor": 4})
    layer = lambda a, b: StructuredDense(D, text, use_bias=False, in_axes=a, out_axes=b, path="factored")
    up, down = layer("embed", "mlp"), layer("mlp", "embed")
    x = jax.ShapeDtypeStruct((ROWS, 3, D), jnp.float32)
    boxed = [jax.eval_shape(m.init, jax.random.key(0), x) for m in (up, down)]
    args = [placed(b, shardings(mesh, b)) for b in boxed]
    fn = lambda u, d, x: down.apply(d, jax.nn.gelu(up.apply(u, x)))
    got = sent(mesh, fn, args, batch_sharding(mesh).spec, WHOLE)
    assert {kind: t.count for kind, t in got.items()} == {"all-reduce": 1}


def test_scanned_layers_count_each():
    mesh = make_mesh({"data": 2, "tensor": 4})
    weights = [(5, D, D)] * 2
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(weights, (P(None, None, "tensor"), P(None, "tensor", None)))
    ]
    layer = lambda x, w: (jax.nn.relu(x @ w[0]) @ w[1], None)
    got = sent(mesh, lambda up, down, x: jax.lax.scan(layer, x, (up, down))[0], args, WHOLE, WHOLE)
    assert got == {"all-reduce": Traffic(5, 5 * OUTPUT)}
