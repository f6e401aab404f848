import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.data.mri import acquisition, coils, masks, phantoms
from structmat.models.msense import MSense
from structmat.models.sense import forward, sense, zero_filled
from structmat.nn import assign, sites

RNG = np.random.default_rng(0)
SIZE = 32


def normal(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


def test_operator_is_that_of_the_data_and_zero_filling_its_adjoint():
    with jax.enable_x64(True):
        maps, mask = normal(3, 6, 10), RNG.random((6, 10)) < 0.5
        x, y = normal(2, 6, 10), normal(2, 3, 6, 10)
        np.testing.assert_allclose(forward(x, maps, mask), acquisition.forward(x, maps, mask), atol=1e-13)
        back = zero_filled(y, jnp.asarray(maps), mask)
        assert np.vdot(y, forward(x, maps, mask)) == pytest.approx(np.vdot(back, x), rel=1e-13)


def test_full_sampling_gives_the_phantom_back():
    image = phantoms.shepp_logan(SIZE)
    maps, full = coils.coil_maps(SIZE, 4), np.ones((SIZE, SIZE), bool)
    kspace = acquisition.acquire(image, maps, full, None, 0)
    np.testing.assert_allclose(zero_filled(kspace, maps, full), image, atol=2e-6)
    np.testing.assert_allclose(sense(kspace, maps, full), image, atol=2e-6)


def test_regular_lines_are_unfolded_exactly():
    """Every second line is well posed for several coils: two pixels are folded, and their sensitivities differ."""
    maps, mask = coils.coil_maps(SIZE, 8), masks.lines((SIZE, SIZE), 2, centre=0.0, pattern="regular")
    image = phantoms.random_phantom(SIZE, 0)
    kspace = acquisition.acquire(image, maps, mask, None, 0)
    error = lambda x: np.linalg.norm(x - image) / np.linalg.norm(image)
    assert error(zero_filled(kspace, maps, mask)) > 0.1
    assert error(sense(kspace, maps, mask, 0.0, 60)) < 1e-4
    folded = np.stack([maps[0], np.roll(maps[0], SIZE // 2, -1)])
    assert np.linalg.matrix_rank(folded.reshape(2, -1)) == 2


def test_weight_gives_the_tikhonov_solution():
    """Against the normal equations solved densely."""
    with jax.enable_x64(True):
        maps, mask, y = normal(2, 4, 5), RNG.random((4, 5)) < 0.6, normal(3, 2, 4, 5)
        basis = np.eye(20).reshape(20, 4, 5)
        a = acquisition.forward(basis, maps, mask).reshape(20, -1).T
        right = a.conj().T @ (mask * y).reshape(3, -1).T
        expected = np.linalg.solve(a.conj().T @ a + 0.3 * np.eye(20), right).T.reshape(3, 4, 5)
        np.testing.assert_allclose(sense(y, maps, mask, 0.3, 100, 1e-12), expected, atol=1e-9)
        norms = [np.linalg.norm(sense(y, maps, mask, w, 100, 1e-12)) for w in (0.03, 0.3, 3.0)]
    assert norms[0] > norms[1] > norms[2]


def test_msense_starts_at_zero_filling_and_has_few_parameters():
    h, w, count = 12, 20, 3
    y, maps, mask = normal(2, count, h, w), normal(count, h, w), RNG.random((h, w)) < 0.5
    example = y.astype(np.complex64), maps.astype(np.complex64), mask
    model = MSense()
    held = nn.unbox(jax.jit(model.init)(jax.random.key(0), *example))
    expected = acquisition.adjoint(y, maps, mask)
    np.testing.assert_allclose(model.apply(held, *example), expected, atol=1e-5)
    table = sites(model, *example)
    assert list(table) == ["columns", "rows"] and {s.kind for s in table.values()} == {"linear"}
    params = sum(2 * a.size for a in jax.tree.leaves(held))
    assert params == sum(s.bound.params for s in table.values()) == 2 * (h * (3 + 4) + w * (4 + 5))
    dense = assign(model, "columns -> monarch(blocks=2); rows -> dense()", *example)
    full = nn.unbox(jax.jit(dense.init)(jax.random.key(0), *example))
    assert full["params"]["rows"]["kernel"].shape == (h, h)
    np.testing.assert_allclose(dense.apply(full, *example), expected, atol=1e-4)


def test_msense_learns_to_weigh_frequencies():
    """Adam on the conjugated gradient lowers the error on phantoms that it was not trained on."""
    machine = acquisition.scanner(16, coils=4, acceleration=2, snr=(25.0, 25.0))
    train, test = acquisition.scans(machine, range(8)), acquisition.scans(machine, range(100, 104))
    model, tx = MSense(), optax.adam(3e-3)
    params = nn.unbox(model.init(jax.random.key(0), train["kspace"], machine.maps, machine.mask))

    def loss(params, batch):
        found = model.apply(params, batch["kspace"], machine.maps, machine.mask)
        return jnp.mean(jnp.abs(found - batch["image"]) ** 2)

    @jax.jit
    def step(params, state):
        slope = jax.tree.map(jnp.conj, jax.grad(loss)(params, train))
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    before, state = loss(params, test), tx.init(params)
    for _ in range(30):
        params, state = step(params, state)
    assert loss(params, test) < 0.9 * before
