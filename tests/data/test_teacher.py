import jax
import numpy as np
import pytest
from flax.core import meta

from structmat.data import teacher
from structmat.data.errors import DataError
from structmat.training.config import validate
from structmat.training.errors import ConfigError
from structmat.training.task import mean_metrics
from structmat.training.tasks import teacher as task_of
from tests.training.small_runs import small_teacher


def test_targets_are_the_networks_output_with_mean_0_and_variance_1():
    net = teacher.load(3, inputs=4, width=32, depth=3)
    x = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    h = x.astype(np.float64)
    for w in net.weights[:-1]:
        h = np.maximum(h @ w, 0)
    raw = (h @ net.weights[-1])[:, 0]
    np.testing.assert_allclose(net(x), (raw - net.mean) / net.std, atol=1e-4)
    assert abs(net(x).mean()) < 0.05 and abs(net(x).std() - 1) < 0.05
    assert [w.shape for w in net.weights] == [(4, 32), (32, 32), (32, 1)]


def test_points_are_fresh_and_held_out_ones_apart():
    net = teacher.load(0, width=32, depth=3)
    parts = [teacher.teacher_batch(net, seed, step, 64)["x"] for seed in (0, 1) for step in (0, 1)]
    rows = np.concatenate([*parts, teacher.heldout_set(net, 0)["x"]])
    assert len(np.unique(rows, axis=0)) == len(rows) == 4 * 64 + teacher.HELDOUT
    assert net.sha256 != teacher.load(1, width=32, depth=3).sha256
    with pytest.raises(DataError, match="depth must be at least 2, got 1"):
        teacher.load(0, depth=1)


def test_padded_points_count_for_nothing_and_the_mean_scores_one():
    config = small_teacher(batch=3000)
    config.eval.batches = 0
    task = validate(config)
    source = task.load()
    variables = {"params": _zeros(task)}
    parts = [task_of.loss(task.model, variables, batch, None, False)[1] for batch in source.heldout()]
    assert [float(p["count"]) for p in parts] == [3000, 3000, 2192]
    assert mean_metrics(parts)["mse"] == pytest.approx(1.0, abs=1e-3) and source.reference == {"mean": 1.0}


def _zeros(task):
    shapes = jax.eval_shape(task.model.init, jax.random.key(0), *task.example)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), meta.unbox(shapes))


@pytest.mark.parametrize(("field", "value"), [("inputs", 0), ("depth", 1), ("seed", -1)])
def test_sizes_no_network_has_are_refused(field, value):
    config = small_teacher()
    config.data[field] = value
    with pytest.raises(ConfigError, match=rf"data\.{field}"):
        validate(config)
