"""Stacks of scanned groups taken apart and put together: no bit changes, and nothing is copied that need not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.surgery import by_layer, rebuild


def tree(*groups):
    """Two leaves for each of four layers, in these groups, under a step count."""
    part = lambda start, stop, width: jnp.arange(start * width, stop * width, dtype=jnp.float32).reshape(-1, width)
    layers = {}
    for start, stop in groups:
        alone = stop == start + 1
        name = f"layers_{start}" if alone else f"layers_{start}to{stop - 1}"
        w, b = part(start, stop, 3), part(start, stop, 2)
        layers[name] = {"up": {"kernel": w[0] if alone else w}, "norm": {"scale": b[0] if alone else b}}
    return {"count": jnp.int32(7), "mu": layers}


WHOLE, SPLIT, MIXED = tree((0, 4)), tree((0, 1), (1, 2), (2, 3), (3, 4)), tree((0, 2), (2, 3), (3, 4))


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def test_layers_are_found_under_their_own_paths():
    pieces = by_layer(MIXED)
    assert set(pieces) == {"count"} | {
        f"mu/layers_{i}/{leaf}" for i in range(4) for leaf in ("up/kernel", "norm/scale")
    }
    array, index = pieces["mu/layers_1/up/kernel"]
    assert index == 1 and array is MIXED["mu"]["layers_0to1"]["up"]["kernel"]
    assert pieces["mu/layers_3/norm/scale"][1] is None


@pytest.mark.parametrize("old", [WHOLE, SPLIT, MIXED], ids=["whole", "split", "mixed"])
@pytest.mark.parametrize("new", [WHOLE, SPLIT, MIXED], ids=["whole", "split", "mixed"])
def test_groups_change_and_bits_do_not(old, new):
    found = rebuild(old, abstract(new), {})
    assert jax.tree.structure(found) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(new)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    if old is new:
        assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(old)))


def test_what_is_given_comes_first_and_touches_one_layer_only():
    fresh = jnp.full((5, 3), -1.0)
    found = rebuild(MIXED, abstract(WHOLE), {"mu/layers_2/up/kernel": (fresh, 4)})
    expected = np.asarray(WHOLE["mu"]["layers_0to3"]["up"]["kernel"]).copy()
    expected[2] = -1
    np.testing.assert_array_equal(np.asarray(found["mu"]["layers_0to3"]["up"]["kernel"]), expected)
    assert found["count"] is MIXED["count"]


def test_what_does_not_fit_is_named():
    template = abstract(tree((0, 4)))
    template["mu"]["layers_0to3"]["down"] = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    with pytest.raises(ValueError, match="no array for mu/layers_0/down"):
        rebuild(MIXED, template, {})
    for wrong in (jnp.zeros((1, 4)), jnp.zeros((1, 3), jnp.int32)):
        with pytest.raises(ValueError, match=r"mu/layers_0to3/up/kernel needs float32 \(3,\) of a layer"):
            rebuild(MIXED, abstract(WHOLE), {"mu/layers_2/up/kernel": (wrong, 0)})
    with pytest.raises(ValueError, match="count needs int32"):
        rebuild({**WHOLE, "count": jnp.float32(7)}, abstract(WHOLE), {})
