"""Every wrong config is refused by field and value, without reading data or compiling."""

import jax
import pytest
from ml_collections import ConfigDict

from structmat.training.config import FREE, LATER, completed, default, differences, identity, validate
from structmat.training.errors import ConfigError
from structmat.training.tasks import TASKS


def config_for(name):
    """The default config of a task, or of a task with one of its models: `lm` or `lm/llama`."""
    return default(*name.split("/"))


def apply(config, changes):
    with config.unlocked(), config.ignore_type():
        for field, value in changes.items():
            *parents, last = field.split(".")
            node = config
            for part in parents:
                node = node[part]
            if value is MISSING:
                del node[last]
            else:
                node[last] = value
    return config


MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
BAD = [
    ("lm", {"task": "lmm"}, "task", "did you mean 'lm'"),
    ("lm", {"task": None}, "task", "valid: lm, digits"),
    ("lm", {"seed": -1}, "seed", "-1"),
    ("lm", {"seed": 2**31}, "seed", "2147483648"),
    ("lm", {"seed": "0"}, "seed", "must be of type int"),
    ("lm", {"steps": 0}, "steps", "at least 1"),
    ("lm", {"steps": 2.5}, "steps", "must be of type int"),
    ("lm", {"steps": True}, "steps", "must be of type int"),
    ("lm", {"steps": 2**31}, "steps", "below"),
    ("lm", {"batch": 0}, "batch", "at least 1"),
    ("lm", {"batch": 12}, "batch", "nearest: 8, 16"),
    ("lm", {"accumulate": 0}, "accumulate", "at least 1"),
    ("lm", {"accumulate": 4}, "batch", "mesh data x fsdp x accumulate = 32; nearest: 32, 64"),
    ("lm", {"batch": 12, "mesh.replica": 2, "mesh.fsdp": 2}, "batch", "mesh replica x data x fsdp = 8; nearest: 8, 16"),
    ("lm", {"bacth": 8}, "bacth", "did you mean 'batch'"),
    ("lm", {"batch": MISSING}, "batch", "missing"),
    ("lm", {"max_skips": 0}, "max_skips", "at least 1"),
    ("lm", {"log_every": 0}, "log_every", "at least 1"),
    ("lm", {"eval.every": -1}, "eval.every", "at least 0"),
    ("lm", {"eval.batches": -2}, "eval.batches", "-2"),
    ("lm", {"checkpoint.every": 0}, "checkpoint.every", "at least 1"),
    ("lm", {"checkpoint.keep": 0}, "checkpoint.keep", "at least 1"),
    ("lm", {"profile": "5"}, "profile", "start:stop"),
    ("lm", {"profile": "20:10"}, "profile", "'20:10'"),
    ("lm", {"profile": "0:9999"}, "profile", "<= 600"),
    ("lm", {"model": 3}, "model", "must be of type dict"),
    ("lm", {"model.name": "mlp"}, "model.name", "valid: gpt"),
    ("lm", {"model.layers": 0}, "model.layers", "at least 1"),
    ("lm", {"model.width": -16}, "model.width", "-16"),
    ("lm", {"model.heads": 5}, "model.heads", "must divide model.width=128; 4 does"),
    ("lm", {"model.heads": 0}, "model.heads", "at least 1"),
    ("lm", {"model.context": 0}, "model.context", "at least 1"),
    ("lm", {"model.vocab": 1}, "model.vocab", "256 for bytes"),
    ("lm", {"model.dropout": 1.0}, "model.dropout", "[0, 1)"),
    ("lm", {"model.dtype": "float16"}, "model.dtype", "bfloat16"),
    ("lm", {"model.remat": "ful"}, "model.remat", "did you mean 'full'"),
    ("lm", {"model.scan": "yes"}, "model.scan", "must be of type bool"),
    ("lm", {"model.widht": 128}, "model.widht", "did you mean 'width'"),
    ("lm", {"optim.name": "adam"}, "optim.name", "did you mean 'adamw'"),
    ("lm", {"optim.schedule": "cosin"}, "optim.schedule", "did you mean 'cosine'"),
    ("lm", {"optim.lr": 0.0}, "optim.lr", "above 0"),
    ("lm", {"optim.lr": float("nan")}, "optim.lr", "finite"),
    ("lm", {"optim.lr": "1e-3"}, "optim.lr", "must be of type float"),
    ("lm", {"optim.warmup": -1.0}, "optim.warmup", "at least 0"),
    ("lm", {"optim.warmup": 600}, "optim.warmup", "below steps=600"),
    ("lm", {"optim.warmup": 2.5}, "optim.warmup", "whole steps"),
    ("lm", {"optim.weight_decay": -0.1}, "optim.weight_decay", "-0.1"),
    ("lm", {"optim.b1": 1.0}, "optim.b1", "[0, 1)"),
    ("lm", {"optim.b2": -0.5}, "optim.b2", "[0, 1)"),
    ("lm", {"optim.eps": 0.0}, "optim.eps", "above 0"),
    ("lm", {"optim.clip": -1.0}, "optim.clip", "at least 0"),
    ("lm", {"mup.base_width": 0}, "mup.base_width", "at least 1"),
    ("lm", {"mesh.data": 3}, "mesh", "nearest valid"),
    ("lm", {"mesh.tensor": 16}, "mesh", "16"),
    ("lm", {"mesh.model": 2}, "mesh.model", "valid: data, fsdp, replica, tensor"),
    ("lm", {"mesh.replica": 3}, "mesh", "nearest valid"),
    ("lm", {"structure": ""}, "structure", "monarch"),
    ("lm", {"structure": "monrach(blocks=4)"}, "structure", "did you mean 'monarch'"),
    ("lm", {"structure": "low_rank(rank=4) extra"}, "structure", "low_rank(rank=4) extra"),
    ("lm", {"structure": "low_rank(rnk=4)"}, "structure", "did you mean 'rank'"),
    ("lm", {"structure": "monarch(blocks=7)"}, "structure", "nearest valid"),
    ("lm", {"structure": "layer_0/.* -> dense()"}, "structure", "matches no site"),
    ("lm", {"structure": "layers_( -> dense()"}, "structure", "not a regular expression"),
    ("lm", {"model.name": "lama"}, "model.name", "did you mean 'llama'"),
    ("lm", {"model.name": 7}, "model.name", "must be of type str"),
    ("lm", {"model.kv_heads": 2}, "model.kv_heads", "no such field"),
    ("lm/llama", {"model.mlp_ratio": 4}, "model.mlp_ratio", "no such field"),
    ("lm/llama", {"model.kv_heads": 3}, "model.kv_heads", "must divide model.heads=4; 2 does"),
    ("lm/llama", {"model.heads": 128, "model.kv_heads": 128}, "model.heads", "heads of even size"),
    ("lm/llama", {"model.hidden": 0}, "model.hidden", "at least 1"),
    ("lm/llama", {"model.hiden": 8}, "model.hiden", "did you mean 'hidden'"),
    ("lm/llama", {"model.theta": 0.0}, "model.theta", "above 0"),
    ("lm/llama", {"model.eps": -1e-6}, "model.eps", "above 0"),
    ("lm/llama", {"mup.base_width": 33}, "mup.base_width", "even"),
    ("lm/llama", {"model.remat": "dot"}, "model.remat", "did you mean 'dots'"),
    ("lm", {"model.name": 7}, "model.name", "must be of type str"),
    ("lm", {"model.name": MISSING}, "model.name", "missing"),
    ("digits", {"structure": "layers_1 -> fourier()"}, "structure", "is complex"),
    ("digits", {"model.heads": 4}, "model.heads", "no such field"),
    ("images", {"model.patch": 3}, "model.patch", "must divide model.size=8; 2 does"),
    ("images", {"model.heads": 7}, "model.heads", "must divide model.width=64; 8 does"),
    ("images", {"model.classes": 0}, "model.classes", "at least 1"),
    ("images", {"model.pool": "tokn"}, "model.pool", "did you mean 'token'"),
    ("images", {"model.name": "vti"}, "model.name", "did you mean 'vit'"),
    ("images/mixer", {"model.heads": 4}, "model.heads", "no such field"),
    ("images", {"model.remat": "all"}, "model.remat", "valid: none, full, dots"),
    ("digits", {"model.layers": 0}, "model.layers", "at least 1"),
    ("digits", {"data.root": "/x"}, "data.root", "no such field"),
    ("mri", {"structure": "fourier()"}, "structure", "nothing to train"),
    ("mri", {"switch": "0.5: frozen(dense())"}, "switch", "nothing to train after step"),
]


@pytest.mark.parametrize(("task", "changes", "field", "hint"), BAD, ids=[f"{c}" for _, c, _, _ in BAD])
def test_bad_config_is_refused(task, changes, field, hint):
    with pytest.raises(ConfigError) as caught:
        validate(apply(config_for(task), changes), devices=8)
    text = str(caught.value)
    value = next(iter(changes.values()))
    assert caught.value.field == field and text.startswith(f"config.{field} = ")
    assert hint in text
    assert value is MISSING or field == "mesh" or repr(value) in text
    assert text.count("\n") < 10


def test_validate_reads_no_data_and_compiles_nothing(monkeypatch):
    config = apply(default("lm"), {"data.root": "/nowhere/at/all"})
    compiled = []
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *a: compiled.append(self))
    task = validate(config, devices=8)
    assert task.name == "lm" and not compiled


@pytest.mark.parametrize(("task", "model"), [(name, model) for name, task in TASKS.items() for model in task.MODELS])
def test_defaults_are_valid_and_resolve_structures(task, model):
    config = default(task, model)
    assert config.model.name == model
    own = {
        "resnet": "layers_.*/conv. -> ",
        "resnet_v1": "layers_.*/conv./conv -> ",
        "vgg": "layers_[1-9].*/conv -> ",
        "unet": "down_.*/conv. -> ",
    }.get(model, "")  # no site of kind linear
    config.structure = own + "fit(low_rank(), params=0.5)"
    built = validate(config, devices=8)
    names = {(site.kind, site.bound.structure.name) for site in built.table.values()}
    assert names >= {("conv" if own else "linear", "low_rank")} | (
        {("head", "dense")} if model not in ("msense", "unet") else set()
    )


def test_identity_leaves_out_what_may_change():
    one, two = default("lm"), default("lm")
    two.mesh.data, two.log_every, two.optim.lr = 4, 7, 1e-3
    assert [key for key, _, _ in differences(identity(one), identity(two))] == ["optim.lr"]
    assert not set(FREE) & set(identity(one))


@pytest.mark.parametrize("task", ["lm", "images", "digits", "navier_stokes"])
def test_a_config_stored_before_there_were_fields_is_completed(task):
    now = default(task)
    fields = now.to_dict()
    for group, later in LATER.items():
        for field in later:
            fields.get(group, {}).pop(field, None)
    old = ConfigDict(fields)
    with pytest.raises(ConfigError, match="this field is missing"):
        validate(old, devices=1)
    assert completed(old).to_dict() == now.to_dict() and identity(old) == identity(now)
