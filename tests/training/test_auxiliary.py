"""What structures add to the loss: in training only, apart from the task's loss, in scanned layers and parts of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structmat.training.config import validate
from structmat.training.step import gradients
from tests.marks import mostly_long
from tests.training.small_runs import small_lm

MOE = "btt_moe(experts=4, balance=0.5)"


def built(tmp_path, structure=MOE, **fields):
    config = small_lm(tmp_path, structure=structure)
    config.model.update(layers=2, **{k: v for k, v in fields.items() if k == "scan"})
    config.accumulate = fields.get("accumulate", 1)
    task = validate(config, devices=1)
    tokens = jax.random.randint(jax.random.key(1), task.batch["tokens"].shape, 0, 256)
    return task, {"tokens": tokens}


@pytest.mark.parametrize(
    "structure", mostly_long([MOE, f"weight_norm({MOE})", f"fake_quantized({MOE}, bits=8)"], [MOE])
)
def test_evaluation_is_without_it_and_training_has_it_apart(tmp_path, structure):
    task, batch = built(tmp_path, structure)
    variables = jax.jit(task.model.init)(jax.random.key(0), batch["tokens"][:, :-1])
    variables = {"params": jax.tree.map(lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf, variables["params"],
                                        is_leaf=lambda leaf: hasattr(leaf, "unbox"))}  # fmt: skip
    score = lambda train: jax.jit(
        lambda v: task.loss(task.model, v, batch, jax.random.key(2) if train else None, train)
    )(variables)
    (value, metrics), (plain, evaluated) = score(True), score(False)
    assert "auxiliary" not in evaluated and float(metrics["loss"]) == pytest.approx(float(plain), rel=1e-6)
    sites = sum("btt_moe" in str(site.bound.structure) for site in task.table.values())
    assert sites == 12
    assert float(metrics["auxiliary"]) == pytest.approx(12 * 0.5 * (1 + 0.1 * np.log(4) ** 2), rel=1e-4)
    assert float(value) == pytest.approx(float(plain + metrics["auxiliary"]), rel=1e-6)


@pytest.mark.long
def test_its_gradient_is_the_same_scanned_or_not_and_of_parts_of_a_batch(tmp_path):
    found = {}
    for name, fields in {"scan": {}, "loop": {"scan": False}, "parts": {"accumulate": 2}}.items():
        task, batch = built(tmp_path, **fields)
        params = jax.eval_shape(task.model.init, jax.random.key(0), batch["tokens"][:, :-1])["params"]
        unboxed = jax.tree.map(
            lambda leaf: getattr(leaf, "value", leaf), params, is_leaf=lambda leaf: hasattr(leaf, "value")
        )
        zeros = jax.tree.map(lambda leaf: 0.01 * jnp.ones(leaf.shape, leaf.dtype), unboxed)
        value, grads, metrics = jax.jit(
            lambda p, task=task, batch=batch: gradients(task, {"params": p}, batch, jax.random.key(0))
        )(zeros)
        gates = [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if "gate" in jax.tree_util.keystr(path)
        ]
        found[name] = float(value), float(metrics["auxiliary"]), float(sum(jnp.sum(g) for g in gates))
        assert float(value) == pytest.approx(float(metrics["loss"] + metrics["auxiliary"]), rel=1e-5)
    assert found["loop"] == pytest.approx(found["scan"], rel=1e-4)
    assert found["parts"][1] == pytest.approx(found["scan"][1], rel=0.2)  # of two halves, each balanced by itself
