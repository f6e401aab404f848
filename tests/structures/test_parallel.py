"""A sum of nonlinear branches: values, accounting, refusal of what needs a matrix, and masks in it that move."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.nn import choose_path
from structmat.sparse import find_masks
from structmat.sparse.masks import get, put
from structmat.structures import StructureError, parse
from structmat.training.config import validate
from structmat.training.methods import rule_for
from structmat.training.rule import dense_gradients, wanted_parts, wanted_sites
from structmat.training.state import TrainState, abstract_variables
from tests.marks import mostly_long
from tests.training.small_runs import small_digits

MASKED = "masked(dense(), unstructured(density=0.25), rule='plain')"


@pytest.mark.parametrize(("activation", "law"), [("relu", lambda h: h * (h > 0)), ("tanh", jnp.tanh)])
def test_values_are_those_of_branches_added(activation, law):
    bound = parse(f"parallel(dense(), count=3, activation='{activation}')").bind(16, 20)
    params = bound.init(jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, 16)))
    expected = sum(law(x @ np.asarray(params[str(i)]["kernel"])) for i in range(3))
    np.testing.assert_allclose(bound.matmul(params, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        bound.take(params, jnp.arange(16)), bound.matmul(params, jnp.eye(16)), rtol=1e-5, atol=1e-5
    )


def test_it_counts_and_starts_as_a_sum_of_its_branches():
    bound, total = parse("parallel(dense(), count=3)").bind(16, 20), parse("dense() + dense() + dense()").bind(16, 20)
    assert bound.params == 3 * 320 and bound.cost(7).flops == 2 * 7 * 960 and bound.leaves() == total.leaves()
    masked = parse(f"parallel({MASKED}, count=4)").bind(16, 20)
    assert masked.cost(7).flops == 2 * 7 * 320 and parse(str(masked.structure)) == masked.structure
    half = parse("fit(parallel(low_rank(), count=2), params=0.5)").bind(16, 20)
    assert half.structure.a.rank == int(0.5 * 320 / 2 / 36)


@pytest.mark.parametrize("text", ["parallel(dense(), count=2)", "dense() + scaled(parallel(dense(), count=2), s=0.5)"])
def test_what_needs_a_matrix_is_refused(text):
    bound = parse(text).bind(16, 20)
    params = bound.init(jax.random.key(0))
    assert not bound.is_linear and choose_path(bound, 10**6)[0] == "factored"
    for call in (
        lambda: bound.materialize(params),
        lambda: bound.rmatmul(params, jnp.ones((2, 20))),
        lambda: bound.project(jnp.ones((16, 20))),
    ):
        with pytest.raises(StructureError, match="is not a matrix"):
            call()


@pytest.mark.parametrize(
    ("text", "said"), [("parallel(dense())", "count"), ("parallel(dense(), count=0)", "count=0|at least 1")]
)
def test_bad_arguments(text, said):
    with pytest.raises(StructureError, match=said):
        parse(text).bind(16, 20)


NESTED = [
    (f"parallel({MASKED}, count=2)", ("layers_0/0", "layers_0/1")),
    (f"bottleneck({MASKED}, {MASKED}, inner=9, activation='relu') + {MASKED}", ("layers_0/0/0", "layers_0/0/1")),
]


@pytest.mark.parametrize(("structure", "parts"), mostly_long(NESTED, NESTED[1:]))
def test_masks_behind_a_nonlinearity_grow_by_their_own_gradients(structure, parts):
    """Those of the loss by the masked weight, at every entry: by differences where the mask is off."""
    config = small_digits(structure=structure, method="rigl(every=1, drop=0.5)")
    task = validate(config, devices=1)
    rule = rule_for(config, task.table)
    assert wanted_parts(rule, task.table) == parts
    assert set(wanted_sites(rule, task.table)) == ({"layers_0"} if "+" in structure else set())
    assert [m.gradient for m in find_masks(task.table, "rigl") if m.apart] == list(parts)
    batch, rng = task.load().batch(0, None), np.random.default_rng(0)
    draw = lambda s: jnp.asarray(
        rng.random(s.shape) < 0.25 if s.dtype == bool else 0.3 * rng.normal(size=s.shape), s.dtype
    )
    variables = jax.tree.map(draw, nn.unbox(abstract_variables(task)))
    loss = jax.jit(lambda v: task.loss(task.model, v, batch, jax.random.key(0), True)[0])
    found = jax.jit(lambda v: dense_gradients(loss, v, wanted_sites(rule, task.table), parts))(variables)
    for path, grad in found.items():
        if path not in parts:
            continue
        place = tuple(path.split("/"))
        mask, kernel = (*place, "mask"), (*place, "weights", "kernel")
        best = np.where(get(variables["frozen"], mask), 0, np.abs(grad))
        at = np.unravel_index(best.argmax(), best.shape)
        lit = {"frozen": put(variables["frozen"], mask, get(variables["frozen"], mask).at[at].set(True))}
        w = get(variables["params"], kernel)
        ends = [loss(lit | {"params": put(variables["params"], kernel, w.at[at].set(e))}) for e in (3e-3, -3e-3)]
        assert float(ends[0] - ends[1]) / 6e-3 == pytest.approx(float(grad[at]), rel=0.05) and best.max() > 1e-3
    step = jax.jit(rule.update)
    state = TrainState(jnp.int32(1), variables["params"], variables["frozen"], (), {}, jnp.zeros(2, jnp.int32))
    after = step(jax.random.key(0), jnp.int32(1), found, state)
    for path in parts:
        old, new = (np.asarray(get(s.frozen, (*path.split("/"), "mask"))) for s in (state, after))
        grown = new & ~old
        assert grown.any() and np.abs(found[path])[grown].min() >= np.median(np.abs(found[path]))
