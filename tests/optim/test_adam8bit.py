"""Adam with moments of 8 bits: what the codes lose, what is kept, and that training hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.optim.adam8bit import pack, packs, scale_by_adam_8bit, unpack
from structmat.parallel import make_mesh
from structmat.training import loop
from structmat.training.build import optimizer_for
from structmat.training.config import validate
from structmat.training.state import plan_state
from tests.training.small_runs import small_digits
from tests.training.test_loop import compile_fast  # noqa: F401  a fixture


def moments(shape=(32, 512)):
    """Averages of gradients over six orders of magnitude, and of their squares."""
    size = 10 ** jax.random.uniform(jax.random.key(0), shape, minval=-6.0, maxval=0.0)
    return size * jax.random.rademacher(jax.random.key(1), shape, jnp.float32), size**2


def test_codes_are_close_where_it_matters_and_squares_never_vanish():
    mu, nu = moments()
    kept = pack(mu, nu)
    assert [k.dtype for k in kept] == [jnp.int8, jnp.uint8, jnp.float32, jnp.float32]
    assert kept[0].shape == mu.shape and kept[2].shape == (32, 2)
    back, squares = unpack(mu, *kept)
    assert np.max(np.abs(back - mu)) < 0.06
    assert np.max(np.abs(back / mu - 1)[np.abs(mu) > 2e-6]) < 0.06 and np.all(np.sign(back) * np.sign(mu) >= 0)
    assert np.max(np.abs(squares / nu - 1)[np.abs(mu) > 2e-6]) < 0.06 and np.all(squares > 0)
    again = pack(back, squares)
    np.testing.assert_array_equal(again[0], kept[0])
    np.testing.assert_array_equal(again[1], kept[1])
    zero = pack(*2 * [jnp.zeros((64, 64))])
    assert not any(np.any(part) for part in (*zero, *unpack(jnp.zeros((64, 64)), *zero)))


def test_one_block_does_not_see_another():
    mu, nu = moments()
    mu, nu = mu.at[:, :256].multiply(1e6), nu.at[:, :256].multiply(1e12)
    back, squares = unpack(mu, *pack(mu, nu))
    alone = unpack(mu[:, 256:], *pack(mu[:, 256:], nu[:, 256:]))
    np.testing.assert_array_equal(back[:, 256:], alone[0])
    np.testing.assert_array_equal(squares[:, 256:], alone[1])


def test_steps_are_those_of_adam():
    """On gradients with noise, over a hundred steps; of small and complex parameters to rounding."""
    params = {"w": jnp.zeros((64, 96)), "b": jnp.zeros(96), "z": jnp.zeros(3, jnp.complex64)}
    assert packs(params["w"]) and not packs(params["b"]) and not packs(params["z"])
    scales = 10 ** jax.random.uniform(jax.random.key(2), (64, 96), minval=-4.0, maxval=0.0)

    def grads(key):
        ours = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype) + 1, params)
        return ours | {"w": ours["w"] * scales}

    txs = optax.scale_by_adam(b1=0.9, b2=0.95), scale_by_adam_8bit(b1=0.9, b2=0.95)

    def run(tx):
        def one(carry, key):
            total, state = carry
            step, state = tx.update(grads(key), state)
            return (jax.tree.map(jnp.add, total, step), state), None

        return jax.lax.scan(one, (params, tx.init(params)), jax.random.split(jax.random.key(3), 100))[0][0]

    exact, ours = (jax.jit(run, static_argnums=0)(tx) for tx in txs)
    for name in ("b", "z"):
        np.testing.assert_allclose(ours[name], exact[name], rtol=1e-4)
    off = np.linalg.norm(ours["w"] - exact["w"]) / np.linalg.norm(exact["w"])
    assert 1e-5 < off < 0.05


def test_moments_take_a_quarter_and_follow_their_parameters_over_a_mesh():
    config = small_digits(structure="dense()")
    config.model.width = 512
    config.mesh.update(data=2, fsdp=2, tensor=2)
    found = {}
    for name in ("adamw", "adamw_8bit"):
        config.optim.name = name
        task = validate(config)
        found[name] = plan_state(task, optimizer_for(config, task)[0], None, make_mesh(config.mesh.to_dict()))
    size = lambda name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found[name].opt_state))
    assert 0.25 < size("adamw_8bit") / size("adamw") < 0.28
    state = next(s for s in found["adamw_8bit"].opt_state if hasattr(s, "mu_scale"))
    own = found["adamw_8bit"].params["layers_0"]["kernel"].sharding
    for tree in (state.mu, state.nu):
        leaf = tree["layers_0"]["kernel"]
        assert leaf.dtype.itemsize == 1 and leaf.sharding == own and not leaf.sharding.is_fully_replicated


@pytest.mark.long
def test_training_hardly_notices(tmp_path):
    losses = []
    for name in ("adamw", "adamw_8bit"):
        config = small_digits(structure="dense()", steps=150)
        config.model.width = 256
        config.optim.update(name=name, lr=2e-3)
        losses.append(loop.train(config, tmp_path / name).metrics["heldout"]["loss"])
    assert losses[0] != losses[1] and abs(losses[1] - losses[0]) < 0.02, losses
