"""Multi-grid patches: what they hold, that they stitch, and that a mesh splits them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from structmat.models.multigrid import margin_points, patch, points, stitch
from structmat.parallel import make_mesh, on_mesh


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("space", [(16,), (16, 32), (32, 16)])
def test_stitched_patches_are_the_field(levels, space):
    x = np.random.default_rng(0).normal(size=(2, *space, 3)).astype(np.float32)
    for margin in (0, 3, tuple(range(1, len(space) + 1))):
        cut = patch(x, levels, margin)
        sides = np.array(space) // 2**levels + 2 * np.array(margin)
        assert cut.shape == (2 * 2 ** (levels * len(space)), *sides, 3 * (levels + 1))
        back = stitch(cut, levels, margin)
        np.testing.assert_array_equal(back[..., :3], x)


def test_windows_against_the_papers_steps():
    """Subsample by 2^l, pad around, cut windows at the stride; one axis after the other, by numpy alone."""
    x, levels, p = np.random.default_rng(1).normal(size=(1, 16, 32, 2)), 2, 1
    got = np.asarray(patch(x, levels, p))
    for level in range(levels + 1):
        small = x[0, :: 2**level, :: 2**level]
        widths, strides = (4, 8), (4 // 2**level, 8 // 2**level)
        pads = [-(-(w - s) // 2) + p for w, s in zip(widths, strides)]
        wide = np.pad(small, [(q, q) for q in pads] + [(0, 0)], mode="wrap")
        for i in range(4):
            for j in range(4):
                a, b = i * strides[0], j * strides[1]
                window = wide[a : a + widths[0] + 2 * p, b : b + widths[1] + 2 * p]
                np.testing.assert_allclose(got[4 * i + j, ..., 2 * level : 2 * level + 2], window, atol=1e-6)


@pytest.mark.parametrize("margin", [0, 5])
def test_windows_are_centred_on_their_patch(margin):
    """On a ramp that does not wrap (an infinite axis), every level's window has the patch's own mean, to half its step."""
    length, levels = 64, 2
    for level in range(levels + 1):
        for i, window in enumerate(points(length, levels, level, margin)):
            steps = np.diff(window) % length
            assert (steps == 2**level).all() and len(window) == 16 + 2 * margin
            middle = window[0] + 2**level * (len(window) - 1) / 2
            off = (middle - (16 * i + 7.5) + length / 2) % length - length / 2
            assert abs(off) <= 2**level / 2, (level, i, off)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"axis 1 of .* must divide by 16; 24 does not"):
        patch(np.zeros((1, 16, 24, 1)), 2)
    with pytest.raises(ValueError, match="not patches of 1 levels"):
        stitch(np.zeros((3, 4, 4, 1)), 1)
    with pytest.raises(ValueError, match="must not be negative"):
        patch(np.zeros((1, 8, 8, 1)), 1, -1)
    with pytest.raises(ValueError, match="fraction of the whole side"):
        margin_points(1.5, (8, 8))
    assert margin_points(0.1, (64, 32)) == (6, 3)


def test_a_mesh_splits_one_domain():
    """One image on 8 devices: 16 patches, two on each; the same output and gradient as on one device."""
    x = np.random.default_rng(2).normal(size=(1, 16, 32, 2)).astype(np.float32)
    k = np.random.default_rng(3).normal(size=(3, 3, 6, 2)).astype(np.float32)
    flat = lambda z: jax.lax.conv_general_dilated(z, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def local(x):
        return flat(nn.with_logical_constraint(patch(x, 2, 1), ("batch", None, None, None)))

    whole = lambda x: stitch(local(x), 2, 1)
    loss = lambda x: jnp.sum(jnp.sin(whole(x)))
    expected = whole(x), jax.grad(loss)(x)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with on_mesh(mesh):
        held = jax.device_put(x, NamedSharding(mesh, P()))
        windows = jax.jit(local)(held)
        got = jax.jit(lambda x: (whole(x), jax.grad(loss)(x)))(held)
    assert {s.data.shape[0] for s in windows.addressable_shards} == {2} and len(windows.addressable_shards) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, expected)
