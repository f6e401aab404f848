"""SGD against its recurrence as torch has it, the schedule in steps, and what does not go with them."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.optim import make_optimizer, make_schedule
from structmat.training.config import default, validate
from structmat.training.errors import ConfigError

SPEC = dict(name="sgd", lr=0.1, schedule="constant", warmup=0, weight_decay=0.05, b1=0.9, b2=0.99, eps=1e-8, clip=0.0)


@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov"])
def test_steps_are_those_of_the_recurrence(name):
    rng = np.random.default_rng(0)
    theirs, grads = rng.normal(size=5), rng.normal(size=(4, 5))
    tx = make_optimizer(SPEC | {"name": name}, None, True, 10)
    ours = jnp.asarray(theirs, jnp.float32)
    state, velocity = tx.init(ours), np.zeros(5)
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state, ours)
        ours = optax.apply_updates(ours, updates)
        decayed = grad + 0.05 * theirs
        velocity = 0.9 * velocity + decayed
        theirs = theirs - 0.1 * (decayed + 0.9 * velocity if name == "sgd_nesterov" else velocity)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_the_rate_drops_by_ten_at_fractions_of_the_run():
    schedule = make_schedule(SPEC | {"schedule": "steps", "drops": "0.5, 0.75", "warmup": 10}, 100)
    found = [float(schedule(step)) for step in (0, 5, 10, 49, 50, 74, 75, 99)]
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)
    assert float(make_schedule(SPEC | {"schedule": "steps", "drops": "0.5"}, 100)(0)) == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["", "0.5; 0.7", "0.7, 0.5", "0.5, 0.5", "0.5, 1", "0, 0.5", "half"])
def test_other_drops_are_refused(text):
    config = default("digits")
    config.optim.drops = text
    with pytest.raises(ConfigError, match=r"optim\.drops = .*ascending fractions"):
        validate(config, devices=1)


def test_multipliers_are_refused():
    config = default("digits")
    config.optim.name = "sgd"
    with pytest.raises(ConfigError, match=r"mup\.enabled = True: does not go with optim.name='sgd'"):
        validate(config, devices=1)
    with pytest.raises(ValueError, match="takes no multipliers"):
        make_optimizer(SPEC, 2.0, True, 10)
