"""Everything that changes during a run, as one pytree with a sharding on every leaf."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from structmat.parallel import shardings, state_shardings, unbox
from structmat.training.task import BATCH_STATS, TEACHER, Task

if TYPE_CHECKING:
    from structmat.training.rule import Rule


@flax.struct.dataclass
class TrainState:
    """Saved, restored, sharded and donated whole.

    Attributes:
      step: int32 (), number of steps taken, skipped ones included; the only clock.
      params: trainable leaves. frozen: the others, never differentiated. batch_stats: running statistics of batch
        normalisation, {} where there are none.
      opt_state: the optimiser's. rule_state: the Rule's, or {}.
      skips: int32 (2,): steps skipped in a row, and in all, for a non-finite loss, gradient or update.
      teacher: the variables of the task's teacher, which never change; None, without leaves, where there is none. They are
        part of the state so that every checkpoint has what the steps after it need, with checksums and shardings.
    """

    step: jax.Array
    params: Any
    frozen: Any
    opt_state: Any
    rule_state: Any
    skips: jax.Array
    teacher: Any = None
    batch_stats: Any = flax.struct.field(default_factory=dict)


def variables_of(state: TrainState) -> dict[str, Any]:
    """What the model's `apply` takes."""
    own = {"params": state.params, "frozen": state.frozen}
    return own | ({BATCH_STATS: state.batch_stats} if state.batch_stats else {})


def trained_variables(state: TrainState) -> dict[str, Any]:
    """What the training loss takes: the model's variables, and those of a teacher as the collection TEACHER."""
    return variables_of(state) | ({} if state.teacher is None else {TEACHER: state.teacher})


def abstract_variables(task: Task) -> Any:
    """Shapes of the model's variables, still boxed with their logical axes."""
    return jax.eval_shape(lambda key: task.model.init(key, *_zeros(task)), jax.random.key(0))


def initial_state(task: Task, tx: optax.GradientTransformation, rule: Rule | None, key: jax.Array) -> TrainState:
    """The state before step 0; traceable."""
    variables = nn.meta.unbox(task.model.init(key, *_zeros(task)))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        frozen=variables.get("frozen", {}),
        opt_state=tx.init(variables["params"]),
        rule_state={},
        skips=jnp.zeros((2,), jnp.int32),
        batch_stats=variables.get(BATCH_STATS, {}),
    )
    return state if rule is None else state.replace(rule_state=rule.init(task.table, state))


def plan_state(task: Task, tx: optax.GradientTransformation, rule: Rule | None, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf: the template of creation, restore and ahead-of-time compiles.

    Every leaf is laid out over the mesh, down to Adam's count: a restore commits a leaf left on one device there, and
    the next step then fails.
    """
    abstract = jax.eval_shape(lambda: initial_state(task, tx, rule, jax.random.key(0)))
    places = state_shardings(mesh, shardings(mesh, abstract_variables(task)), abstract)
    template = jax.tree.map(_placed, abstract, places)
    return template if task.teacher is None else template.replace(teacher=_plan_teacher(task, mesh))


def _plan_teacher(task: Task, mesh: Mesh) -> dict[str, Any]:
    """The teacher's variables lie as they did when they were the state's."""
    boxed = abstract_variables(task.with_model(task.teacher.model))
    shapes = {"frozen": {}} | {
        name: held for name, held in unbox(boxed).items() if name in ("params", "frozen", BATCH_STATS)
    }
    return jax.tree.map(_placed, shapes, state_shardings(mesh, shardings(mesh, boxed), shapes))


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def create_state(
    task: Task, tx: optax.GradientTransformation, rule: Rule | None, template: TrainState, seed: int
) -> TrainState:
    """The initial state, made where it will live; to be called with the mesh set."""
    places = jax.tree.map(lambda leaf: leaf.sharding, template)

    def init(key_data: jax.Array) -> TrainState:
        return initial_state(task, tx, rule, jax.random.wrap_key_data(key_data))

    # An argument, not a constant: seeds share one compiled program, and XLA draws nothing while it compiles.
    return jax.jit(init, out_shardings=places)(np.asarray(jax.random.key_data(jax.random.key(seed))))


def _zeros(task: Task) -> list[jax.Array]:
    return [jnp.zeros(e.shape, e.dtype) for e in task.example]
