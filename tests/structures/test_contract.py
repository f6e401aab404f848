"""Every structure keeps the contract of `structmat.structures.base`, product, gradient and accounting alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import structmat
from structmat.structures import flatten_leaves, map_leaves
from structmat.structures.algebra import BoundProduct, BoundSum
from structmat.structures.composite import Composite
from structmat.structures.elementwise import BoundElementwise
from structmat.structures.leaf import count_params
from structmat.structures.wrappers import BoundScaled, Wrapper
from tests.structures.cases import (
    CASES,
    STRAIGHT_THROUGH,
    bind,
    dense,
    draw,
    flagged,
    is_complex,
    is_float,
    label,
    names,
    rows,
    split,
    with_long,
)
from tests.structures.flops import count_flops

every = pytest.mark.parametrize("case", CASES, ids=label)
costly = pytest.mark.parametrize("case", with_long(CASES))
PER_NAME = [*{bind(c).structure.name: c for c in CASES}.values()]


def some_names(start):
    """One case per structure name, every second of them among the long tests, so that each is in one of two tests."""
    mark = lambda i: [pytest.mark.long] * (i % 2 != start)
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=mark(i), id=label(c)) for i, c in enumerate(PER_NAME)]
    )


def leaf_arrays(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaf_arrays(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def close(actual, expected, tolerance=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


# -- text and declaration ------------------------------------------------------------------------------------------------


@every
def test_text_round_trip(case):
    structure, bound = structmat.parse(case[0]), bind(case)
    assert structmat.parse(str(structure)) == structure
    assert structmat.parse(structure.short()) == structure
    again = structmat.parse(str(bound.structure)).bind(case[1], case[2])
    assert again == bound and hash(again) == hash(bound)
    assert str(again.structure) == str(bound.structure)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_declare_what_init_draws(case, dtype):
    bound = bind(case)
    shapes = dict(leaf_arrays(jax.eval_shape(functools.partial(bound.init, dtype=dtype), jax.random.key(1))))
    declared = dict(flatten_leaves(bound.leaves("embed", "mlp")))
    assert declared.keys() == shapes.keys()
    for name, leaf in declared.items():
        assert shapes[name].shape == leaf.shape, name
        assert shapes[name].dtype == (leaf.dtype or dtype), name
        assert len(leaf.axes) == len(leaf.shape) and leaf.fan_in >= 1 and leaf.fan_out >= 1 and leaf.share >= 1, name
        assert leaf.trainable <= is_float(shapes[name]), name


# -- products ------------------------------------------------------------------------------------------------------------


@costly
def test_products_equal_the_dense_ones(case):
    """matmul with 0 to 2 leading axes, take, the transposed product and the transposed Bound; one compile for all."""
    bound, flipped, params = bind(case), bind(case).transpose(), draw(case)
    xs = [rows(case, *leading) for leading in ((), (5,), (2, 3))]
    y = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, bound.d_out)), jnp.float32)
    ids = np.array([[0, 3, 3], [bound.d_in - 1, 1, 0]], np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def results(bound, params, xs, y, ids):
        return {
            "matmul": [bound.matmul(params, x) for x in xs],
            "rmatmul": bound.rmatmul(params, y),
            "take": [bound.take(params, ids), bound.take(params, ids[0, 1])],
            "flipped": [flipped.matmul(params, y), flipped.rmatmul(params, xs[1]), flipped.materialize(params)],
            "flipped take": flipped.take(params, ids[1, 1:]),
        }

    got, w = results(bound, params, xs, y, ids), dense(case)
    expected = {
        "matmul": [np.asarray(x) @ w for x in xs],
        "rmatmul": np.asarray(y) @ w.T,
        "take": [w[ids], w[3]],
        "flipped": [np.asarray(y) @ w.T, np.asarray(xs[1]) @ w, w.T],
        "flipped take": w.T[ids[1, 1:]],
    }
    jax.tree.map(close, got, expected)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype("complex64" if bound.is_complex else "float32")}
    assert (flipped.d_in, flipped.d_out) == (bound.d_out, bound.d_in) and flipped.transpose() == bound


INDEXED = [c for c in CASES if not all(map(is_float, jax.tree.leaves(jax.eval_shape(bind(c).init, jax.random.key(0)))))]


@pytest.mark.parametrize("case", with_long(INDEXED, 2))
def test_supports_and_codes_do_not_depend_on_the_64_bit_switch(case):
    init = bind(case).init
    indices = lambda: [np.asarray(v) for v in jax.tree.leaves(jax.jit(init)(jax.random.key(0))) if not is_float(v)]
    narrow = indices()
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, indices(), narrow)


@pytest.mark.parametrize("case", with_long(CASES, 2))
def test_float64_products_and_gradients(case):
    """In double precision: the product to 1e-12, gradients against the dense path and against central differences."""
    bound = bind(case)
    with jax.enable_x64(True):
        wider = lambda v: jnp.complex128 if is_complex(v) else jnp.float64
        wide = lambda v: jnp.asarray(np.asarray(v), wider(v)) if is_float(v) else v
        params, x = jax.tree.map(wide, draw(case)), wide(rows(case, 3))
        floats, join = split(params)
        along = [wide(jnp.asarray(np.random.default_rng(8).normal(size=f.shape))) for f in floats]
        probe = jnp.asarray(np.random.default_rng(9).normal(size=(3, bound.d_out)))
        parts = lambda y: y.real + 2 * y.imag if bound.is_complex else y
        factored = lambda f, x: bound.matmul(join(f), x)
        through_dense = lambda f, x: x @ bound.materialize(join(f))

        @jax.jit
        def results(f, x):
            scalar = lambda fn: lambda f, x: jnp.sum(probe * jnp.sin(parts(fn(f, x))))
            grads = [jax.grad(scalar(fn), (0, 1))(f, x) for fn in (factored, through_dense)]
            move = lambda eps: scalar(factored)([a + eps * v for a, v in zip(f, along)], x)
            return factored(f, x), through_dense(f, x), *grads, (move(1e-5) - move(-1e-5)) / 2e-5

        y, expected, got, want, slope = results(floats, x)
        assert y.dtype == (jnp.complex128 if bound.is_complex else jnp.float64)
        close(y, expected, 1e-12)
        jax.tree.map(functools.partial(close, tolerance=1e-11), got, want)
        if not names(bound.structure) & STRAIGHT_THROUGH:
            # jax's gradient of a complex leaf is conjugated: df = Re(sum g dv).
            close(sum(np.sum(np.asarray(g) * v).real for g, v in zip(got[0], along)), slope, 1e-7)


@some_names(0)
def test_transformations(case):
    """Under jit with the Bound static, vmap and scan over a stack of parameters give what a loop gives."""
    x = rows(case, 4)
    each = [draw(case, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *p: np.stack(p), *each)
    floats, join = split(stack)

    @functools.partial(jax.jit, static_argnums=0)
    def results(bound, floats, x):
        scanned = lambda f: jax.lax.scan(lambda c, p: (c, bound.matmul(p, x)), 0, join(f), length=3)[1]
        vmapped = lambda f: jax.vmap(bound.matmul, (0, None), axis_size=3)(join(f), x)
        squares = lambda fn: jax.grad(lambda f: (jnp.sum(jnp.abs(y := fn(f)) ** 2), y), has_aux=True)
        return [squares(fn)(floats)[::-1] for fn in (scanned, vmapped)]

    values, grads = zip(*results(bind(case), floats, x))
    for value in values:
        close(value, np.stack([np.asarray(x) @ dense(case, seed) for seed in range(3)]))
    jax.tree.map(functools.partial(close, tolerance=1e-4), *grads)


@some_names(1)
def test_bfloat16(case):
    bound, params, x = bind(case), draw(case), rows(case, 4)
    narrow = lambda p: p.astype(jnp.bfloat16) if is_float(p) and not is_complex(p) else p

    @jax.jit
    def results(params, x):
        small = jax.tree.map(narrow, params)
        take = bound.take(small, jnp.array([0]))
        return bound.matmul(small, narrow(x)), take, bound.materialize(small), bound.matmul(params, narrow(x))

    *own, mixed = results(params, x)
    wide = jnp.dtype("complex64" if bound.is_complex else "float32")
    has_dtype = any(map(is_float, jax.tree.leaves(params)))  # without a leaf only the product has a dtype to follow
    assert {v.dtype for v in (own if has_dtype else own[:1])} == {wide if bound.is_complex else jnp.dtype("bfloat16")}
    expected = np.asarray(x) @ dense(case)
    for y in (own[0], mixed):
        assert np.linalg.norm(np.asarray(y, wide) - expected) < 0.05 * np.linalg.norm(expected)


# -- accounting ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cost_is_what_the_arrays_hold(case, dtype):
    bound, count = bind(case), 5
    params = jax.tree.leaves(jax.eval_shape(functools.partial(bound.init, dtype=dtype), jax.random.key(0)))
    cost = bound.cost(count, dtype)
    assert cost.params == bound.params == sum(p.size * (1 + is_complex(p)) for p in params if is_float(p))
    assert cost.bits == 8 * sum(p.size * p.dtype.itemsize for p in params)
    assert cost.bytes == cost.bits // 8 + count * (bound.d_in + bound.d_out) * jnp.dtype(dtype).itemsize
    assert cost.params == sum(count_params(leaf) for _, leaf in flatten_leaves(bound.transpose().leaves()))


@every
def test_flops_are_those_traced(case):
    bound, params, x = bind(case), draw(case), rows(case, 5)
    if flagged(case, "untraced"):
        pytest.skip("counted in its own test")
    factored, through_dense = bound.cost(5), bound.cost(5, path="dense")
    assert factored.flops == factored.flops_executed == count_flops(bound.matmul, params, x)
    assert through_dense.flops == factored.flops
    assert through_dense.flops_executed == count_flops(lambda p, x: x @ bound.materialize(p), params, x)
    flipped = bound.transpose()
    y = jnp.ones((5, bound.d_out), x.dtype)
    assert flipped.cost(5).flops == count_flops(flipped.matmul, params, y)


# -- initialisation ------------------------------------------------------------------------------------------------------


def with_init(structure, mode):
    if not isinstance(structure, Composite):
        return dataclasses.replace(structure, init=mode)
    if structure.name == "sum":
        return dataclasses.replace(structure, terms=tuple(with_init(t, mode) for t in structure.terms))
    fields = {f.name: getattr(structure, f.name) for f in structure.own_fields()}
    return dataclasses.replace(
        structure, **{n: with_init(v, mode) for n, v in fields.items() if isinstance(v, structmat.Structure)}
    )


def stated_power(bound, leaves):
    """E[y^2] / E[x^2] from the declaration: std^2 fan_in multiplied over factors, added over the terms of a sum."""
    if isinstance(bound, BoundSum):
        return sum(stated_power(t, leaves[str(i)]) for i, t in enumerate(bound.terms))
    if isinstance(bound, BoundProduct):
        return stated_power(bound.a, leaves["0"]) * stated_power(bound.b, leaves["1"])
    if isinstance(bound, BoundElementwise):
        return stated_power(bound.a, leaves["0"]) * stated_power(bound.b, leaves["1"]) / bound.d_in
    if isinstance(bound, BoundScaled):
        return bound.structure.s**2 * stated_power(bound.inner, leaves)
    if isinstance(bound, Wrapper) and bound.structure.name == "frozen":
        return stated_power(bound.inner, leaves)
    return np.prod([leaf.std**2 * leaf.fan_in for _, leaf in flatten_leaves(leaves) if leaf.law != "index"])


def sample(leaf, current, rng, count):
    """`count` draws of a leaf as declared; index leaves keep the current ones."""
    if leaf.law == "index":
        return np.broadcast_to(current, (count, *current.shape))
    if leaf.law in ("ones", "zeros"):
        return np.full((count, *leaf.shape), leaf.std if leaf.law == "ones" else 0, np.float32)
    unit = rng.normal if leaf.law == "normal" else lambda size: rng.uniform(-(3**0.5), 3**0.5, size)
    shape = (count, *leaf.shape)
    if leaf.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return np.asarray(leaf.std * (unit(size=shape) + 1j * unit(size=shape)) / 2**0.5, leaf.dtype)
    return np.asarray(leaf.std * unit(size=shape), np.float32)


@costly
def test_output_size_at_init(case):
    """E[y^2] for x of variance 1 is |W|^2 / d_out: 1 for `variance`, the product over the factors for `spectral`."""
    bound, rng = bind(case), np.random.default_rng(0)
    if flagged(case, "unstated"):
        pytest.skip("stated in its own test")
    size = lambda p: jnp.sum(jnp.abs(bound.materialize(p)) ** 2) / bound.d_out
    power = jax.jit(jax.vmap(size, axis_size=400))
    for mode in ("spectral", "variance"):
        leaves = with_init(bound.structure, mode).bind(case[1], case[2]).leaves()
        expected = stated_power(bound, leaves)
        if mode == "variance":
            assert expected == pytest.approx(bound.structure.s**2 if bound.structure.name == "scaled" else 1)
        drawn = np.asarray(power(map_leaves(lambda leaf, now: sample(leaf, now, rng, 400), leaves, draw(case))))
        assert abs(drawn.mean() - expected) < 5 * drawn.std() / 20 + 1e-5 * expected


def scales(bound):
    """Whether a gain acts; where none does it is refused with a reason, lest a branch starts larger than asked."""
    try:
        bound.leaves(gain=0.0)
    except structmat.StructureError as error:
        assert "no leaf that scales the matrix" in str(error)
        return False
    return True


@pytest.mark.parametrize("case", with_long(CASES, 2))
def test_init_follows_the_declaration(case):
    """Entries have the declared RMS, depend on the key alone, and `gain` scales the matrix."""
    bound = bind(case)
    gains = (2.0, 0.0) if scales(bound) else ()

    @jax.jit
    def results(key):
        params = bound.init(key)
        return params, [bound.materialize(p) for p in (params, *(bound.init(key, gain=g) for g in gains))]

    key = functools.partial(jax.random.key, impl="unsafe_rbg")  # compiles several times faster
    params, (one, *scaled) = results(key(3))
    other = dict(leaf_arrays(results(key(4))[0]))
    for gain, matrix in zip(gains, scaled):
        close(matrix, gain * one)
    jax.tree.map(np.testing.assert_array_equal, params, results(key(3))[0])
    arrays = dict(leaf_arrays(params))
    for name, leaf in flatten_leaves(bound.leaves()):
        values = np.abs(np.asarray(arrays[name], np.complex128))
        rms = float(np.sqrt(np.mean(values**2))) if leaf.law != "index" else leaf.std
        assert abs(rms - leaf.std) <= 4 * leaf.std / np.sqrt(leaf.size), name
        if leaf.law in ("normal", "uniform") and leaf.std > 0:
            assert np.any(arrays[name] != other[name]), name


@every
def test_train_names_what_trains(case):
    structure, bound = bind(case).structure, bind(case)
    flags = {n: leaf.trainable for n, leaf in flatten_leaves(bound.leaves()) if leaf.law != "index"}
    if isinstance(structure, Composite):
        frozen = [n for n, on in flags.items() if not on]
        assert bool(frozen) == ("frozen" in names(structure))
        return
    free = [
        n
        for n, leaf in flatten_leaves(dataclasses.replace(structure, train=None).bind(*case[1:3]).leaves())
        if leaf.trainable
    ]
    for chosen in [(), *((n,) for n in free), tuple(free)]:
        leaves = dataclasses.replace(structure, train=chosen).bind(*case[1:3]).leaves()
        assert {n for n, leaf in leaves.items() if leaf.trainable} == set(chosen)
        assert all(leaf.share == max(len(chosen), 1) for leaf in leaves.values())
    with pytest.raises(structmat.StructureError, match="train has no leaf 'nothing'"):
        dataclasses.replace(structure, train=("nothing",)).bind(*case[1:3]).leaves()
