"""Distillation after a switch: its terms by hand, the teacher kept through a kill, and what it refuses."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from structmat.parallel import make_mesh, on_mesh, unbox
from structmat.training import dry_run, loop
from structmat.training.build import lower_step, optimizer_for, step_for, stored_plan
from structmat.training.config import validate
from structmat.training.distill import Distill
from structmat.training.errors import ConfigError
from structmat.training.load import load_run
from structmat.training.metrics import read_metrics
from structmat.training.state import abstract_variables, plan_state
from structmat.training.step import gradients
from structmat.training.switch import stages
from structmat.training.switching import noted
from tests.training.small_runs import small_digits, small_lm, small_teacher, write_corpus
from tests.training.test_loop import Killed, array_sums, compile_fast, kill_at  # noqa: F401  a fixture
from tests.training.test_switch import NoMemory

EXACT = "4: layers_0 -> low_rank(rank=16)"
LOGITS = "distill(features=0.0)"


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_terms_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    own, taught = rng.normal(size=(2, 3, 5, 7))
    blocks = [{name: rng.normal(size=(3, 5, 4)) for name in "ab"} for _ in range(2)]
    found = Distill(weight=0.5, temperature=3.0, features=2.0).terms((own, blocks[0]), (taught, blocks[1]))
    p, q = softmax(own / 3), softmax(taught / 3)
    expected = 0.5 * 9 * (q * np.log(q / p)).sum(-1).mean()
    assert float(found["distill_logits"]) == pytest.approx(expected, rel=1e-5)
    squares = np.mean(
        [np.mean((blocks[0][name] - blocks[1][name]) ** 2) / np.mean(blocks[1][name] ** 2) for name in "ab"]
    )
    assert float(found["distill_features"]) == pytest.approx(2 * squares, rel=1e-5)
    assert set(Distill(weight=0.0).terms((own, blocks[0]), (taught, blocks[1]))) == {"distill_features"}


def drawn(task, seed):
    """Variables of the task's model, none of them zero."""
    shapes = unbox(abstract_variables(task))["params"]
    rng = np.random.default_rng(seed)
    return {"params": jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes), "frozen": {}}


TINY = small_lm("unread", switch="6: layers_1/mlp/.* -> monarch(blocks=2)", method="distill(0.5, 2.0, 3.0)")
TINY.model.update(layers=2, width=8)


@pytest.mark.long
def test_gradient_where_layers_are_grouped_otherwise_than_the_teachers():
    """Against models without scanned groups, whose outputs are found layer by layer."""
    _, (begun, task) = stages(TINY, validate(TINY, devices=1))
    teacher = dataclasses.replace(task.with_model(task.teacher.model), teacher=None)
    variables, taught = drawn(task, 0), drawn(teacher, 1)
    assert begun == 6 and "layers_0to1" in taught["params"] and "layers_1" in variables["params"]
    assert task.step_flops() == 3 * task.flops() + teacher.flops() != teacher.step_flops() == 3 * teacher.flops()
    tokens = jax.random.randint(jax.random.key(1), task.batch["tokens"].shape, 0, 256)
    stacked = taught["params"]["layers_0to1"]
    apart = {name: leaf for name, leaf in taught["params"].items() if name != "layers_0to1"}
    apart |= {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(2)}

    def outputs(model, params):
        out, seen = model.clone(scan=False).apply({"params": params}, tokens[:, :-1], capture_intermediates=True)
        return out, [seen["intermediates"][f"layers_{i}"]["mlp"]["__call__"][0] for i in range(2)]

    def by_hand(params):
        (own, blocks), (wanted, theirs) = outputs(task.model, params), outputs(teacher.model, apart)
        log_p, log_q = jax.nn.log_softmax(own / 2), jax.nn.log_softmax(wanted / 2)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(own), tokens[:, 1:, None], -1).mean()
        divergence = 0.5 * 4 * (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()
        squares = 3 * sum(((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(blocks, theirs)) / 2
        return entropy + divergence + squares, (entropy, divergence, squares)

    given = variables | {"teacher": taught}
    value, grads, metrics = jax.jit(lambda: gradients(task, given, {"tokens": tokens}, jax.random.key(0)))()
    (expected, parts), wanted = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(variables["params"])
    assert float(value) == pytest.approx(float(expected), rel=1e-5) and min(map(float, parts)) > 0.01
    found = [float(metrics[name]) for name in ("loss", "distill_logits", "distill_features")]
    assert found == pytest.approx([float(part) for part in parts], rel=1e-4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7, err_msg=jax.tree_util.keystr(path))


def distilled(**fields):
    config = small_digits(**({"switch": EXACT, "method": LOGITS} | fields))
    config.checkpoint.update(every=4, keep=9)
    config.eval.batches = 1
    return config


def sums_at(folder, step, collection):
    """Checksums of the arrays of one collection, by their path within it."""
    body = json.loads((folder / "checkpoints" / str(step) / "MANIFEST.json").read_text())["body"]
    start = collection + "/"
    return {n.removeprefix(start): a["checksum"] for n, a in body["arrays"].items() if n.startswith(start)}


@pytest.mark.long
def test_resumed_after_the_switch_a_run_has_its_teacher_back(tmp_path):
    config, whole, parts = distilled(), tmp_path / "whole", tmp_path / "parts"
    expected = loop.train(config, whole)
    shutil.copytree(whole, parts)
    (parts / "record.json").unlink()
    shutil.rmtree(parts / "checkpoints" / "12")
    seen = []
    again = loop.train(config, parts, on_step=lambda step, row: seen.append(step))
    assert seen == [9, 10, 11, 12] and again.metrics["heldout"] == expected.metrics["heldout"]
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()

    before = sums_at(whole, 4, "params")
    assert before == sums_at(whole, 8, "teacher/params") == sums_at(parts, 12, "teacher/params")
    assert not sums_at(whole, 4, "teacher") and sums_at(whole, 12, "params") != before
    rows = {row["step"]: row for row in read_metrics(whole) if "loss" in row}
    terms = [rows[step].get("distill_logits") for step in range(1, 13)]
    assert terms[:4] == [None] * 4 and abs(terms[4]) < 3e-7 and terms[11] > 3e-6
    assert load_run(whole).task.table["layers_0"].bound.structure.name == "low_rank"


def test_a_checkpoint_tells_what_its_teacher_is():
    """The template that `extra` gives is that of the run, and the teacher's part that of the state before the switch."""
    config, mesh = distilled(mesh=dict(replica=1, data=1, fsdp=1, tensor=1)), make_mesh({"data": 1}, jax.devices()[:1])
    (_, first), (_, task) = stages(config, validate(config, devices=1))
    extra = json.loads(json.dumps(noted({"switches": []}, task, {"step": 4})))
    plan = lambda own: plan_state(own, optimizer_for(config, own)[0], None, mesh)
    with on_mesh(mesh):
        found, wanted, before = stored_plan(config, first, None, mesh, extra), plan(task), plan(first)
    assert found == wanted and found.teacher["params"] == before.params != found.params and before.teacher is None
    ended = noted(extra, first, {"step": 12})
    assert "teacher" not in ended and [row["step"] for row in ended["switches"]] == [4, 12]


def test_without_weights_the_program_is_the_plain_one():
    programs = []
    for method in ("", "distill(weight=0.0, features=0.0)"):
        config = distilled(method=method, mesh=dict(replica=1, data=1, fsdp=1, tensor=1))
        _, (_, task) = stages(config, validate(config, devices=1))
        tx, schedule = optimizer_for(config, task)
        mesh = make_mesh(config.mesh.to_dict(), jax.devices()[:1])
        with on_mesh(mesh):
            template = plan_state(task, tx, None, mesh)
            programs.append(lower_step(task, step_for(config, task, tx, None, schedule), template, mesh).as_text())
        assert template.teacher is None
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (distilled(switch=""), r"config\.switch = '' has none; config\.switch = '0\.7: .*kronecker"),
        (distilled(switch="end: low_rank(rank=2)"), "switch = 'end: low_rank.* has none"),
        (
            distilled(method="distill()"),
            "features=1.0 compares the outputs of MLP blocks, and this model has none.*head",
        ),
        (distilled(method="distill(weight=-1.0)"), "weight must not be negative, got -1.0"),
        (distilled(method="distill(features=-0.5)"), "features must not be negative, got -0.5"),
        (distilled(method="distill(temperature=0)"), "temperature must be above 0, got 0.0"),
        (distilled(method="distill(tau=2.0)"), "has no argument 'tau'.*temperature"),
        (
            small_teacher(switch="4: layers_0 -> low_rank(rank=4)", method="distill()"),
            "compares the logits of two models, and those of task 'teacher' .*; tasks lm, digits, images have logits",
        ),
    ],
)
def test_refused_at_once(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(config)
    assert caught.value.field == "method"


@pytest.mark.long
def test_the_dry_run_counts_the_teacher(monkeypatch):
    monkeypatch.setattr(dry_run, "compile_step", lambda task, step, template, mesh: NoMemory())
    shown = []
    for method in ("", LOGITS):
        out = io.StringIO()
        dry_run.dry_run(distilled(method=method), Console(file=out, width=200))
        shown.append(out.getvalue().split("from step 5 of 12"))
    (plain, after), (first, second) = shown
    assert plain.partition("method")[0] == first.partition("method")[0]
    size = lambda text: float(text.partition("state: ")[2].split(" KiB")[0])
    assert size(first) == size(plain) and size(second) == pytest.approx(size(after) + 4 * 1210 / 1024, abs=0.1)


@pytest.mark.long
def test_a_run_without_weights_is_the_plain_run(tmp_path):
    for name, method in {"plain": "", "none": "distill(weight=0.0, features=0.0)"}.items():
        loop.train(distilled(method=method), tmp_path / name)
    assert array_sums(tmp_path / "none") == array_sums(tmp_path / "plain")
    assert (tmp_path / "none/metrics.jsonl").read_bytes() == (tmp_path / "plain/metrics.jsonl").read_bytes()


@pytest.mark.long
def test_scanned_layers_in_bfloat16_on_a_mesh_in_parts_of_a_batch(tmp_path):
    """Killed before its switch and after it a run ends with the same bits; one teacher serves until the end."""
    stages = "6: layers_1/mlp/.* -> low_rank(rank=16); end: layers_.*/mlp/.* -> dense()"
    config = small_lm(write_corpus(tmp_path / "corpus"), switch=stages, method="distill()")
    config.update(accumulate=2)
    config.model.update(layers=3, dtype="bfloat16", remat="full", dropout=0.1)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.checkpoint.update(every=2, keep=9)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(config, whole)
    for when in (5, 9):
        with pytest.raises(Killed):
            loop.train(config, parts, on_step=kill_at(when))
    loop.train(config, parts)
    assert array_sums(parts) == array_sums(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert sums_at(whole, 6, "params") == sums_at(whole, 8, "teacher/params") == sums_at(whole, 10, "teacher/params")
    assert not sums_at(whole, 12, "teacher")
    rows = [row for row in read_metrics(whole) if row["step"] > 6 and "loss" in row]
    assert len(rows) == 6 and all(0 <= row["distill_features"] < 1 for row in rows)
    assert sum(row["distill_features"] for row in rows) > 0


@pytest.mark.long
def test_a_switch_to_the_same_function_has_nothing_to_learn(tmp_path):
    config = small_lm(write_corpus(tmp_path / "corpus"), method="distill(temperature=2.0)")
    config.switch = "6: layers_.*/mlp/.* -> low_rank(rank=16)"
    config.model.update(layers=2)
    loop.train(config, tmp_path / "run")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run") if "distill_logits" in row}
    assert list(rows) == list(range(7, 13))
    assert abs(rows[7]["distill_logits"]) < 3e-6 < rows[12]["distill_logits"]
    assert rows[7]["distill_features"] < 1e-9 < rows[12]["distill_features"]
