"""Weights of transformers' models: in, as the same function; out again; and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import finetune, stored
from structmat.data.errors import DataError
from structmat.exchange import bring_in, export_huggingface, run_config, save_run, source_at
from structmat.exchange.tensor_files import tensors_in
from structmat.structures import StructureError
from structmat.training.errors import ConfigError, RunError
from structmat.training.load import load_run, stored_weights
from structmat.training.loop import train
from tests.exchange.theirs import (
    CONTEXT,
    edit_config,
    load_theirs,
    save_theirs,
    their_logits,
    tokens_of,
    write_ids,
    write_tokenizer,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
TOKENS = tokens_of()


def base(folder, **fields):
    config = finetune.get_config()
    config.data.root = str(write_ids(folder / "ids.npy"))
    config.update(steps=2, batch=8, log_every=1)
    config.eval.batches = 2
    config.update(fields)
    return config


def brought(folder, rules="", context=None, **fields):
    """(run's folder, what `bring_in` said) of the model in folder/theirs."""
    source = source_at(folder / "theirs")
    found = bring_in(source, run_config(source, base(folder, **fields), rules, context), folder / "run")
    return folder / "run", found


def our_logits(run, tokens=TOKENS):
    held = load_run(run)
    return np.asarray(jax.jit(held.task.model.apply)(held.variables, jnp.asarray(tokens, jnp.int32)))


VARIANTS = {
    "gpt2 tied": ("gpt2", {}),
    "gpt2 with a head, wide MLP, other eps": (
        "gpt2",
        dict(tie_word_embeddings=False, n_inner=96, layer_norm_epsilon=0.1, activation_function="gelu_pytorch_tanh"),
    ),
    "llama": ("llama", {}),
    "llama, grouped, tied": (
        "llama",
        dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=0.1, rope_theta=100.0),
    ),
    "mistral, one key head, shards": ("mistral", dict(num_key_value_heads=1, sliding_window=None, shard="12KB")),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_theirs_and_again_when_exported(name, tmp_path):
    kind, fields = VARIANTS[name]
    model = save_theirs(tmp_path / "theirs", kind, **fields)
    shards = len(list((tmp_path / "theirs").glob("*.safetensors")))
    assert shards > 3 if "shard" in fields else shards == 1
    wanted = their_logits(model, TOKENS)
    run, found = brought(tmp_path)
    assert np.abs(wanted).max() > 3
    np.testing.assert_allclose(our_logits(run), wanted, atol=1e-4, rtol=0)
    assert all(row.error == 0 and row.params == row.dense_params for row in found.rows)
    assert found.task.params == sum(p.numel() for p in model.parameters())
    config = export_huggingface(run, tmp_path / "again")
    again = load_theirs(tmp_path / "again")
    assert config["model_type"] == kind and type(again) is type(model)
    np.testing.assert_allclose(their_logits(again, TOKENS), wanted, atol=1e-4, rtol=0)


def test_structures_are_the_nearest_and_their_errors_stated(tmp_path):
    save_theirs(tmp_path / "theirs", "gpt2")
    rules = (
        "layers_0/mlp/.* -> low_rank(rank=5); layers_[12]/mlp/up -> monarch(blocks=4); layers_.*/attn/q -> "
        "low_rank(rank=32); embed -> low_rank(rank=3); layers_1/attn/v -> random_sparse(density=0.25, select='magnitude')"
    )
    run, found = brought(tmp_path, rules)
    dense = {p: np.asarray(r()) for p, r in stored_weights(run, ".*").readers.items()}
    source, rows = source_at(tmp_path / "theirs"), {row.path: row for row in found.rows}
    assert list(rows) == list(found.task.table) == sorted(rows, key=list(found.task.table).index)
    for path, row in rows.items():
        theirs = source.matrix(path, found.task.table[path]).astype(np.float64)
        s = np.linalg.svd(theirs, compute_uv=False)
        error = np.linalg.norm(theirs - dense[path]) / np.linalg.norm(theirs)
        assert row.error == pytest.approx(error, abs=2e-6), path
        if row.short.startswith("low_rank"):
            rank = found.task.table[path].bound.structure.rank
            assert row.error == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), abs=2e-6), path
    assert rows["layers_2/mlp/down"].error == 0 and rows["layers_1/mlp/up"].error > 0.3
    assert rows["layers_2/attn/q"].error < 1e-6, "of full rank, so exact"
    off = sum(row.squared[0] for row in found.rows)
    assert off == pytest.approx(sum(r.error**2 * r.squared[1] for r in found.rows), rel=1e-5)


def test_full_rank_is_the_same_function(tmp_path):
    model = save_theirs(tmp_path / "theirs", "llama", num_key_value_heads=2)
    run, _ = brought(tmp_path, "layers_.*/attn/[qo] -> low_rank(rank=32); layers_.*/mlp/up -> spectral()")
    np.testing.assert_allclose(our_logits(run), their_logits(model, TOKENS), atol=2e-4, rtol=0)
    export_huggingface(run, tmp_path / "again")
    np.testing.assert_allclose(
        their_logits(load_theirs(tmp_path / "again"), TOKENS), their_logits(model, TOKENS), atol=2e-4, rtol=0
    )


def test_half_precision_files(tmp_path):
    model = save_theirs(tmp_path / "theirs", "llama", dtype="bfloat16")
    run, _ = brought(tmp_path)
    np.testing.assert_allclose(our_logits(run), their_logits(model, TOKENS), atol=1e-4, rtol=0)
    export_huggingface(run, tmp_path / "again", "bfloat16")
    again = load_theirs(tmp_path / "again")
    assert {t.dtype for t in tensors_in(tmp_path / "again").values()} == {"bfloat16"}
    np.testing.assert_allclose(their_logits(again, TOKENS), their_logits(model, TOKENS), atol=1e-4, rtol=0)


def test_a_shorter_context_is_the_same_function(tmp_path):
    model = save_theirs(tmp_path / "theirs", "gpt2")
    run, _ = brought(tmp_path, context=9)
    np.testing.assert_allclose(our_logits(run, TOKENS[:, :9]), their_logits(model, TOKENS[:, :9]), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match=r"config.model.context = 25: must be within the source's 1 .. 24"):
        brought(tmp_path, context=CONTEXT + 1)


def test_the_run_trains_on_and_its_structures_are_saved_and_brought_back(tmp_path):
    save_theirs(tmp_path / "theirs", "gpt2")
    run, found = brought(tmp_path, "layers_.*/mlp/.* -> low_rank(rank=4)", structure="dense()")
    before = our_logits(run)
    save_run(run, tmp_path / "saved")
    saved = source_at(tmp_path / "saved")
    again = bring_in(saved, run_config(saved, base(tmp_path)), tmp_path / "again")
    np.testing.assert_array_equal(our_logits(tmp_path / "again"), before)
    assert [r.structure for r in again.rows] == [r.structure for r in found.rows] and not any(
        r.error for r in again.rows
    )
    other = bring_in(
        saved, run_config(saved, base(tmp_path), "layers_0/mlp/up -> low_rank(rank=2)"), tmp_path / "other"
    )
    changed = {r.path: r for r in other.rows}
    assert changed["layers_0/mlp/up"].params == 2 * (32 + 128) and changed["layers_0/mlp/up"].error > 0.1
    assert changed["layers_1/mlp/up"].short == "low_rank(rank=4)" and changed["layers_1/mlp/up"].error == 0, "as it was"
    save_run(run, tmp_path / "dense", densify=True)
    dense = source_at(tmp_path / "dense")
    bring_in(dense, run_config(dense, base(tmp_path)), tmp_path / "plain")
    np.testing.assert_allclose(our_logits(tmp_path / "plain"), before, atol=1e-4)
    assert all(s.bound.structure.name == "dense" for s in load_run(tmp_path / "plain").task.table.values())
    record = train(stored.get_config(str(run)), run)
    assert record.metrics["steps"] == 2 and np.isfinite(record.metrics["heldout"]["loss"])
    assert load_run(run).step == 2 and np.abs(our_logits(run) - before).max() > 1e-6


def test_a_run_of_ours_with_a_factor_on_tied_logits_is_exported(tmp_path):
    save_theirs(tmp_path / "theirs", "gpt2")
    source = source_at(tmp_path / "theirs")
    config = run_config(source, base(tmp_path))
    del config.model["tied_scale"]
    bring_in(source, config, tmp_path / "run")
    export_huggingface(tmp_path / "run", tmp_path / "again")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(their_logits(load_theirs(tmp_path / "again"), TOKENS), wanted, atol=1e-4, rtol=0)
    assert np.abs(wanted).max() < 0.3 * np.abs(their_logits(load_theirs(tmp_path / "theirs"), TOKENS)).max()


REFUSED = [
    ("gpt2", dict(activation_function="gelu"), "config.activation_function = 'gelu'.*valid: 'gelu_new'"),
    ("gpt2", dict(n_inner=50), "config.n_inner = 50.*multiple of n_embd=32"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True.*valid: False"),
    ("gpt2", dict(n_head=5), "config.n_head = 5.*must divide n_embd=32"),
    ("gpt2", dict(model_type="gpt_neox"), "model_type='gpt_neox' is no model we have.*valid: gpt2, llama, mistral"),
    ("llama", dict(attention_bias=True), "config.attention_bias = True.*valid: False"),
    ("llama", dict(mlp_bias=True), "config.mlp_bias = True"),
    ("llama", dict(hidden_act="gelu"), "config.hidden_act = 'gelu'.*valid: 'silu'"),
    ("llama", dict(head_dim=16), "config.head_dim = 16.*hidden_size / num_attention_heads = 8"),
    ("llama", dict(num_key_value_heads=3), "num_key_value_heads = 3.*must divide num_attention_heads=4"),
    ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0}), "config.rope_parameters = .*unscaled"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "config.rope_scaling = "),
    ("llama", dict(rope_parameters=None, rope_theta="big"), "config.rope_theta = 'big'.*number above 0"),
    ("llama", dict(quantization_config={"bits": 4}), "config.quantization_config"),
    ("llama", dict(layer_types=["full_attention", "sliding_attention"]), "config.layer_types"),
    ("llama", dict(num_hidden_layers=3), "has no tensor 'model.layers.2.self_attn"),
    ("llama", dict(num_hidden_layers=1), r"9 tensors have no place in a llama, such as model.layers.1"),
    ("llama", dict(intermediate_size=40), r"mlp.down_proj.weight is \(48, 32\) for our layers_0/mlp/down \(40, 32\)"),
]


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    for kind in ("gpt2", "llama"):
        save_theirs(folder / kind, kind)
    return folder


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED)
def test_what_we_cannot_be_is_refused(saved_models, kind, fields, message, tmp_path):
    (tmp_path / "theirs").symlink_to(tmp_path / "own")
    import shutil

    shutil.copytree(saved_models / kind, tmp_path / "own")
    edit_config(tmp_path / "own", **fields)
    with pytest.raises(DataError, match=message):
        brought(tmp_path)
    assert not list((tmp_path / "run").glob("*")), "nothing half done is left"


def test_a_sliding_window_ends_the_context(tmp_path):
    save_theirs(tmp_path / "theirs", "mistral", sliding_window=10, num_key_value_heads=2)
    source = source_at(tmp_path / "theirs")
    assert source.fields["context"] == 10 and "context 10 of 24, where its sliding window ends" in source.description


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("low_rnk(rank=2)", "did you mean 'low_rank'"),
        ("layer_.*/mlp/up -> low_rank(rank=2)", "matches no site; near: layers_"),
        ("layers_.*/mlp/up -> monarch(blocks=5)", "layers_0/mlp/up"),
        ("bottleneck(dense(), dense(), inner=4)", "site layers_0/attn/k: .*no matrix, so nothing can be projected"),
    ],
)
def test_rules_are_checked_before_anything_is_written(saved_models, rules, message, tmp_path):
    (tmp_path / "theirs").symlink_to(saved_models / "gpt2")
    with pytest.raises((ConfigError, StructureError), match=message):
        brought(tmp_path, rules)
    assert not (tmp_path / "run").exists()


def test_damage_is_named(saved_models, tmp_path):
    import shutil

    shutil.copytree(saved_models / "llama", tmp_path / "theirs")
    whole = (tmp_path / "theirs/model.safetensors").read_bytes()
    (tmp_path / "theirs/model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"model.safetensors is not a readable .safetensors file"):
        brought(tmp_path)
    (tmp_path / "theirs/model.safetensors").rename(tmp_path / "theirs/pytorch_model.bin")
    with pytest.raises(DataError, match=r"no .safetensors file, only pytorch_model.bin: load it with transformers"):
        brought(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").write_text("x")
    shutil.rmtree(tmp_path / "theirs")
    shutil.copytree(saved_models / "llama", tmp_path / "theirs")
    with pytest.raises(DataError, match=r"is not empty \(it holds mine\)"):
        brought(tmp_path)


def test_what_cannot_be_exported_is_refused(tmp_path):
    from tests.training.small_runs import small_digits, small_lm, write_corpus

    train(small_digits(steps=2), tmp_path / "digits")
    with pytest.raises(RunError, match="is of task 'digits'"):
        export_huggingface(tmp_path / "digits", tmp_path / "out")
    config = small_lm(write_corpus(tmp_path / "text"), steps=2, structure="lost(rank=2, density=0.25)")
    train(config, tmp_path / "lost")
    for write in (export_huggingface, lambda run, out: save_run(run, out, densify=True)):
        with pytest.raises(StructureError, match=r"site layers_0/attn/k: lost\(.*no dense form"):
            write(tmp_path / "lost", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_run(tmp_path / "lost", tmp_path / "out")
    saved = source_at(tmp_path / "out")
    kept = run_config(saved, small_lm(tmp_path / "text", steps=2, mup=dict(enabled=True, base_width=16)))
    bring_in(saved, kept, tmp_path / "lost_again")
    ours = lambda run: our_logits(run, np.arange(16)[None])
    np.testing.assert_array_equal(ours(tmp_path / "lost_again"), ours(tmp_path / "lost"))


def command(name, *flags):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *flags], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def test_the_commands(tmp_path):
    save_theirs(tmp_path / "theirs", "gpt2")
    data = [f"--config.data.root={write_ids(tmp_path / 'ids.npy')}", "--config.eval.batches=2", "--config.steps=3"]
    run = tmp_path / "run"
    code, text = command(
        "convert",
        f"--from={tmp_path / 'theirs'}",
        f"--out={run}",
        "--rules=layers_.*/mlp/.* -> low_rank(rank=4)",
        "--config=configs/finetune.py",
        *data,
    )
    assert code == 0, text
    assert "] layers_2/mlp/up  0." in text and "Traceback" not in text and "WARNING" not in text
    report = json.loads((run / "convert.json").read_text())
    assert (
        report["kind"] == "convert"
        and len(report["metrics"]["rows"]) == 19
        and "| layers_1/mlp/down |" in (run / "convert.md").read_text()
    )
    code, text = command("evaluate", f"--workdir={run}", "--config.eval.batches=1", f"--out={tmp_path / 'e.json'}")
    assert code == 0 and "held-out bits_per_token" in text, text
    held = json.loads((tmp_path / "e.json").read_text())
    assert held["kind"] == "evaluate" and held["metrics"]["step"] == 0
    code, text = command("evaluate", f"--workdir={run}", "--config.optim.lr=1.0")
    assert code == 2 and "config.optim.lr = 1.0" in text and "Traceback" not in text
    code, text = command("sample", f"--workdir={run}")
    assert code == 2 and "the model is of 96 tokens and no tokenizer is kept with it; give --tokenizer" in text
    code, text = command("sample", f"--workdir={run}", f"--tokenizer={write_tokenizer(tmp_path)}", "--length=30")
    assert code == 0 and text.startswith("def ") and text.split("[0 steps")[0].count(" ") >= 30, text
    code, text = command("convert", "--to=huggingface", f"--workdir={run}", f"--out={tmp_path / 'back'}")
    assert code == 0 and their_logits(load_theirs(tmp_path / "back"), TOKENS).shape == (2, CONTEXT, 96), text
    code, text = command("convert", "--to=safetensors", f"--workdir={run}", "--densify", f"--out={tmp_path / 'saved'}")
    assert code == 0 and (tmp_path / "saved/structmat.json").is_file(), text
    for flags, message in (
        ([f"--from={tmp_path}", f"--out={tmp_path / 'x'}"], "has no config.json"),
        (["--to=huggingface", f"--out={tmp_path / 'x'}"], "--workdir is needed"),
        ([f"--from={tmp_path}", "--densify", f"--out={tmp_path / 'x'}"], "--densify does not go with --from"),
        ([f"--from={tmp_path}"], "--out is needed"),
        ([], "give either --from"),
    ):
        code, text = command("convert", *flags)
        assert code == 2 and message in text and "Traceback" not in text, text
