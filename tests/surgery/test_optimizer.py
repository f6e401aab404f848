"""The optimiser's state when some parameters are new: the others keep their bits, in whatever groups their layers are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from structmat.surgery import by_layer, carry_optimizer


def params(*groups, width):
    """`up/kernel` and `up/bias` of layers in these groups, and a head."""
    arrays = lambda count: {"kernel": jnp.zeros((*count, 2, width)), "bias": jnp.zeros((*count, 2))}
    return {"head": jnp.zeros(3)} | {name: {"up": arrays(count)} for name, count in groups}


def counted(tree, start):
    """Every entry another number."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([start, *(leaf.size for leaf in leaves)])
    return structure.unflatten(
        [jnp.arange(a, a + x.size, dtype=x.dtype).reshape(x.shape) for a, x in zip(ends, leaves)]
    )


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0))
OLD = counted(TX.init(params(("layers_0to2", (3,)), width=4)), 1)
NEW = jax.eval_shape(TX.init, params(("layers_0", ()), ("layers_1to2", (2,)), width=4))
RESTARTED = {
    field: counted(params(("layers_0", ()), ("layers_1to2", (2,)), width=4), start)
    for field, start in (("mu", 1000), ("nu", 2000))
}


def test_changed_leaves_begin_anew_and_the_others_go_on():
    changed = {"layers_0/up/kernel", "layers_2/up/kernel"}
    found, old = by_layer(carry_optimizer(OLD, NEW, RESTARTED, changed)), by_layer(OLD)
    assert len(found) == len(old) == 2 + 2 * 7
    for path, (array, i) in found.items():
        _, field, *param = path.split("/")
        begun = field in RESTARTED and "/".join(param) in changed
        source, j = by_layer(RESTARTED[field])["/".join(param)] if begun else old[path]
        at = lambda a, k: np.asarray(a if k is None else a[k])
        np.testing.assert_array_equal(at(array, i), at(source, j), err_msg=path)
        assert at(array, i).dtype == at(source, j).dtype


def test_what_no_rule_begins_anew_is_named():
    with pytest.raises(ValueError, match=r"keeps 'nu' of layers_0/up/kernel; restarted: mu"):
        carry_optimizer(OLD, NEW, {"mu": RESTARTED["mu"]}, {"layers_0/up/kernel"})
