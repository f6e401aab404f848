"""SST and ReLoRA in runs of real models: what they refuse, what the optimiser keeps, kills and switches."""

import jax
import numpy as np
import pytest

from structmat.nn import site_params
from structmat.training import loop
from structmat.training.build import optimizer_for
from structmat.training.config import validate
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from structmat.training.methods import rule_for
from structmat.training.state import initial_state
from tests.training.small_runs import small_digits, small_lm, write_corpus
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401  a fixture

SST = "sst(rank=3)"
ADAPTER = "frozen(dense()) + low_rank(rank=3)"


@pytest.mark.parametrize(
    ("method", "structure", "message"),
    [
        (
            "sst(every=4, warmup=1)",
            ADAPTER,
            r"such as structure='sst\(rank=16\)', .* has none; its structures: .*frozen",
        ),
        ("sst(every=4, warmup=4)", SST, "warmup=4 must be below every=4"),
        ("sst(every=12, warmup=1)", SST, "every=12 of 12 steps draws triplets once only; .* such as 1"),
        ("sst(every=4, warmup=1, sampling='mxed')", SST, "sampling got 'mxed'; did you mean 'mixed'"),
        (
            "sst(every=4, warmup=1)",
            "sst(rank=3, train=('s', 'u'))",
            "site layers_0 is sst.*, of which v must train too",
        ),
        ("sst(every=4, warmup=-1)", SST, "warmup must be at least 0, got -1"),
        ("relora(every=4, warmup=1)", SST, r"frozen\(dense\(\)\) \+ low_rank\(rank=16\)', and this model has no"),
        ("relora(every=4, warmup=1)", "frozen(dense() + low_rank(rank=3))", "and this model has no such sum"),
        ("relora(every=12, warmup=1)", ADAPTER, "every=12 of 12 steps never merges"),
        ("relora(every=0)", ADAPTER, "every must be at least 1, got 0"),
    ],
)
def test_refused_before_anything_is_read(method, structure, message):
    with pytest.raises(ConfigError, match=message):
        validate(small_digits(method=method, structure=structure))


def test_the_optimiser_keeps_what_a_step_trains(tmp_path):
    """2 (r (d_in + d_out) + m) f32 numbers at every site, in a scanned group too, and one count of the warm-up."""
    config = small_lm(write_corpus(tmp_path / "text"), structure=SST, method="sst(every=4, warmup=2)")
    config.model.layers = 2
    task = validate(config, devices=1)
    tx, _ = optimizer_for(config, task)
    state = jax.eval_shape(lambda: initial_state(task, tx, rule_for(config, task.table), jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    held = [leaf for path, leaf in leaves if name(path).split("/")[-1] in ("s", "u", "v")]
    linear = [site.bound for site in task.table.values() if site.kind == "linear"]
    assert len(linear) == 12 and {(b.d_in, b.d_out) for b in linear} == {(16, 16), (16, 64), (64, 16)}
    numbers = sum(2 * (3 * (b.d_in + b.d_out) + 16) for b in linear)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in held) == 4 * numbers
    assert [name(path) for path, leaf in leaves if "since" in name(path) and leaf.shape == ()]


def same_after_a_kill(config, folder):
    """The arrays of a run and of one that was killed and resumed."""
    loop.train(config, folder / "whole")
    with pytest.raises(Killed):
        loop.train(config, folder / "parts", on_step=kill_at(8))
    loop.train(config, folder / "parts")
    assert (folder / "parts" / "metrics.jsonl").read_bytes() == (folder / "whole" / "metrics.jsonl").read_bytes()
    return array_sums(folder / "whole"), array_sums(folder / "parts")


@pytest.mark.long
@pytest.mark.parametrize(
    ("structure", "method", "leaf"),
    [
        ("sst(rank=8)", "sst(every=2, warmup=1)", "frozen/layers_0/u_rest"),
        ("sst(rank=16)", "sst(every=3, warmup=0)", "params/layers_0/u"),
        (ADAPTER, "relora(every=3, warmup=1)", "frozen/layers_0/0/kernel"),
    ],
)
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(structure, method, leaf, tmp_path):
    whole, parts = same_after_a_kill(small_digits(structure=structure, method=method), tmp_path)
    assert whole == parts and leaf in whole


@pytest.mark.long
@pytest.mark.parametrize(
    ("structure", "method"), [(SST, "sst(every=3, warmup=1)"), (ADAPTER, "relora(every=3, warmup=2)")]
)
def test_a_switch_at_the_end_projects_what_was_trained(structure, method, tmp_path):
    config = small_digits(structure=structure, method=method, switch="end: layers_0 -> low_rank(rank=8)")
    record = loop.train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert record.metrics["switches"][0]["step"] == 12 and run.task.table["layers_0"].bound.structure.name == "low_rank"


@pytest.mark.long
def test_scanned_layers_train_as_unit_vectors(tmp_path):
    """Terms of sums among them; and with the rounds' SVDs within the run."""
    structure = f"layers_.*/mlp/.* -> {SST} + low_rank(rank=1); layers_.*/attn/.* -> sst(rank=8)"
    config = small_lm(write_corpus(tmp_path / "text"), structure=structure, method="sst(every=2, warmup=1)", steps=8)
    config.model.layers = 2
    loop.train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    for path, site in run.task.table.items():
        params = site_params(run.variables, path, site)
        for own in (params, params.get("0", {})):
            if "s" in own:
                assert np.asarray(own["s"]).min() >= 0
                for vectors in ("u", "v", "u_rest", "v_rest"):
                    np.testing.assert_allclose(np.linalg.norm(own[vectors], axis=-1), 1, rtol=1e-5)
