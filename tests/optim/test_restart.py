"""What the optimiser knows of parameters that are new in the middle of a run, and how large their first steps are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.optim import OPTIMIZERS, needs_gradient, restart
from structmat.optim.adam8bit import unpack
from structmat.optim.restart import MOMENTS
from structmat.parallel import make_mesh, on_mesh
from structmat.structures import Rules
from structmat.training.build import optimizer_for
from structmat.training.config import validate
from structmat.training.state import create_state, plan_state, variables_of
from structmat.training.step import gradients, make_step
from structmat.training.switch import Switch, switched
from structmat.training.switching import switch_state
from tests.training.small_runs import small_digits

SPEC = dict(
    name="adamw", lr=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8, clip=0.0
)
GRADS = {"w": jnp.array([3.0, -4.0]), "z": jnp.array([2.0 + 0j])}
LARGE = {"k": jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64)}


def kept(name, params):
    """Field -> tree, of what an optimiser keeps of every parameter."""
    state = OPTIMIZERS[name](SPEC).init(params)
    return {f: v for f, v in state._asdict().items() if jax.tree.structure(v) == jax.tree.structure(params)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_says_what_it_keeps(name):
    fields = kept(name, GRADS)
    found = restart(SPEC | {"name": name}, GRADS, 10)
    assert set(fields) == set(found) and set(MOMENTS[name]) <= set(found)
    for field, tree in fields.items():
        assert jax.tree.map(lambda a: (a.shape, a.dtype), tree) == jax.tree.map(
            lambda a: (a.shape, a.dtype), found[field]
        )
    assert needs_gradient({"name": name}) == name.startswith("adamw")


def test_moments_of_8_bits_restart_as_codes():
    spec = SPEC | {"name": "adamw_8bit"}
    fields, found = kept("adamw_8bit", LARGE), restart(spec, LARGE, 10)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), fields, found)
    assert all(jax.tree.leaves(same)) and found["nu"]["k"].dtype == jnp.uint8
    own = unpack(LARGE["k"], *(found[name]["k"] for name in ("mu", "nu", "mu_scale", "nu_scale")))
    np.testing.assert_allclose(own[1], restart(SPEC, LARGE, 10)["nu"]["k"], rtol=0.2, atol=1e-7)


def test_squares_are_those_of_a_constant_gradient():
    params = jax.tree.map(jnp.zeros_like, GRADS)
    tx = OPTIMIZERS["adamw"](SPEC)
    state = tx.init(params)
    for _ in range(7):
        _, state = tx.update(GRADS, state)
    found = restart(SPEC, GRADS, jnp.int32(7))
    for a, b in zip(jax.tree.leaves(found["nu"]), jax.tree.leaves(state.nu)):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not any(a.any() for a in jax.tree.leaves(found["mu"]))
    assert not any(a.any() for a in jax.tree.leaves(restart(SPEC, GRADS, 0)["nu"]))


def test_gradients_are_clipped_as_in_the_chain_and_bad_ones_leave_zeros():
    norm = float(optax.global_norm(GRADS))
    plain, clipped = (restart(SPEC | {"clip": clip}, GRADS, 5)["nu"]["w"] for clip in (0.0, 1.0))
    np.testing.assert_allclose(clipped * norm**2, plain, rtol=1e-5)
    for clip in (0.0, 1.0):
        found = restart(SPEC | {"clip": clip}, GRADS | {"w": jnp.array([jnp.nan, jnp.inf])}, 5)
        assert not found["nu"]["w"].any() and jnp.isfinite(found["nu"]["z"]).all()


STEPS, LATER = 300, 60
BEGINNINGS = {
    "restart": lambda adam, g: adam,
    "zeros": lambda adam, g: adam._replace(nu=jax.tree.map(jnp.zeros_like, adam.nu)),
    "gradient": lambda adam, g: adam._replace(mu=jax.tree.map(lambda v, g: jnp.sqrt(v) * jnp.sign(g), adam.nu, g)),
    "count": lambda adam, g: jax.tree.map(jnp.zeros_like, adam),
}
"""Moments after a switch: ours, zeros, the average of gradients too begun at one gradient, or a count begun anew."""


def sizes_of_steps(b2):
    """How the moments begin -> (LATER,) sizes of the steps after a switch.

    A size is the root mean square of what a step of the whole chain adds to the hidden weights of a digits model that
    was Monarch for STEPS steps and then dense.
    """
    config = small_digits(structure="monarch(blocks=4)", steps=100 * STEPS, batch=8)
    config.optim.update(schedule="constant", warmup=5.0, weight_decay=0.0, lr=4e-3, b2=b2)
    config.mesh.data = 1
    task = validate(config, devices=1)
    source = task.load()
    batches = jax.tree.map(lambda *a: np.stack(a), *[source.batch(i, None) for i in range(STEPS + LATER)])
    past, future = jax.tree.map(lambda a: a[:STEPS], batches), jax.tree.map(lambda a: a[STEPS:], batches)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with on_mesh(mesh):
        tx, schedule = optimizer_for(config, task)
        step = make_step(task, tx, None, schedule, 0)
        state = create_state(task, tx, None, plan_state(task, tx, None, mesh), 0)
        state, _ = jax.jit(lambda state, batches: jax.lax.scan(lambda s, b: (step(s, b)[0], ()), state, batches))(
            state, past
        )
        dense = switched(task, Switch(STEPS, Rules.of("dense()")))
        tx, schedule = optimizer_for(config, dense)
        after = make_step(dense, tx, None, schedule, 0)
        batch = jax.tree.map(lambda a: a[0], future)
        state, _ = switch_state(config, task, dense, plan_state(dense, tx, None, mesh), state, batch)

        def one(state, batch):
            new, _ = after(state, batch)
            moved = new.params["layers_0"]["kernel"] - state.params["layers_0"]["kernel"]
            return new, jnp.sqrt(jnp.mean(moved**2))

        many = jax.jit(lambda state, batches: jax.lax.scan(one, state, batches)[1])
        is_adam = lambda s: isinstance(s, optax.ScaleByAdamState)
        grads = jax.jit(lambda variables: gradients(dense, variables, batch, jax.random.key(0))[1])(variables_of(state))
        begun = lambda f: jax.tree.map(lambda s: f(s, grads) if is_adam(s) else s, state.opt_state, is_leaf=is_adam)
        return {n: np.asarray(many(state.replace(opt_state=begun(f)), future)) for n, f in BEGINNINGS.items()}


@pytest.mark.long
@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_first_steps_are_of_the_usual_size(b2):
    sizes = sizes_of_steps(b2)
    usual = float(np.mean(sizes["restart"][LATER // 2 :]))
    largest = {name: float(max(own[:10])) / usual for name, own in sizes.items()}
    assert largest["restart"] < 1.5, largest
    assert all(largest[name] > 3 for name in {0.95: ("gradient", "count"), 0.999: ("zeros",)}[b2]), largest
