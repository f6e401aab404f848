"""What GPT-2 and the LLaMA family are called in Hugging Face's folders, and which of them our models can be.

A weight of ours is a whole tensor or some columns of one (the fused `c_attn`), as it is (GPT-2's `Conv1D` is (in, out))
or transposed (torch's `Linear` is (out, in)). Rotary positions pair the same features in both, so no row moves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from structmat.data.errors import DataError
from structmat.structures.errors import suggest

CONFIG = "config.json"
KEPT = "huggingface"
"""Folder in a workdir for what belongs to the weights and is none: config, tokenizer."""
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that go with the weights."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of ours lies: in `tensor`, transposed or not, and of its last axis only part `part` of `parts`."""

    tensor: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def columns(self, size: int) -> slice:
        """The part of a last axis of `size`."""
        own = size // self.parts
        return slice(self.part * own, (self.part + 1) * own)


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model on both sides.

    Attributes:
      model: our name. architecture: their class with a head.
      fields: (their config) -> `config.model` less what says how to train; raises DataError.
      theirs: (our `config.model`) -> the part of their config that says what the model is.
      places: (our `config.model`) -> path of ours -> Place; a site's path is its weight.
      root: prefix of their names that files of the bare model leave out.
      ignored: (name less the root) -> whether it holds no weight, but a mask or a table of angles.
    """

    model: str
    architecture: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    theirs: Callable[[Mapping[str, Any]], dict[str, Any]]
    places: Callable[[Mapping[str, Any]], dict[str, Place]]
    root: str
    ignored: Callable[[str], bool]


def read_config(folder: Path) -> dict[str, Any]:
    """Their config.json.

    Raises:
      DataError: there is none, or it is not readable.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise DataError(
            f"{str(folder)!r} {what}; give what `hf download NAME --local-dir=FOLDER` or model.save_pretrained(FOLDER) wrote"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object")
    return config


def family_of(config: Mapping[str, Any], place: Path) -> Family:
    """By `model_type`.

    Raises:
      DataError: a kind of model that we do not have.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise DataError(f"{place / CONFIG}: model_type={kind!r} is no model we have" + suggest(str(kind), FAMILIES))
    if config.get("quantization_config"):
        raise _refused("quantization_config", config["quantization_config"], "weights must be floats: dequantize first")
    return FAMILIES[kind]


def _refused(field: str, value: Any, valid: str) -> DataError:
    return DataError(f"their config.{field} = {value!r}: our model cannot be that; {valid}")


def _only(config: Mapping[str, Any], field: str, valid: tuple[Any, ...]) -> None:
    """Refuse any other value; a field that is left out is the first."""
    if config.get(field, valid[0]) not in valid:
        raise _refused(field, config[field], f"valid: {', '.join(map(repr, valid))}")


def _sizes(config: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, int]:
    """Our name -> their number."""
    found = {}
    for ours, name in names.items():
        value = config.get(name)
        value = defaults.get(name) if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _refused(name, value, "it must be a whole number of at least 1")
        found[ours] = value
    if found["width"] % found["heads"]:
        raise _refused(names["heads"], found["heads"], f"it must divide {names['width']}={found['width']}")
    return found


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _refused(field, value, f"it must be a number above 0, as {default!r} is")
    return float(value)


def _tie(config: Mapping[str, Any], default: bool) -> bool:
    _only(config, "tie_word_embeddings", (default, not default))
    return bool(config.get("tie_word_embeddings", default))


# -- GPT-2 -----------------------------------------------------------------------------------------------------------

_GPT_SIZES = {
    "vocab": "vocab_size",
    "context": "n_positions",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
}
_GPT_DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of one function, the tanh approximation, which is ours."""


def _gpt_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _sizes(config, _GPT_SIZES, _GPT_DEFAULTS)
    inner = config.get("n_inner") or 4 * found["width"]
    if inner % found["width"]:
        raise _refused("n_inner", inner, f"it must be a multiple of n_embd={found['width']}")
    _only(config, "activation_function", _TANH_GELU)
    _only(config, "scale_attn_weights", (True,))
    _only(config, "scale_attn_by_inverse_layer_idx", (False,))
    _only(config, "add_cross_attention", (False,))
    found |= {"mlp_ratio": inner // found["width"], "eps": _number(config, "layer_norm_epsilon", 1e-5)}
    found["tie"] = _tie(config, True)
    return found | ({"tied_scale": 1.0} if found["tie"] else {})


def _gpt_theirs(model: Mapping[str, Any]) -> dict[str, Any]:
    rate = model["dropout"]
    return {name: model[ours] for ours, name in _GPT_SIZES.items()} | {
        "n_inner": None if model["mlp_ratio"] == 4 else model["mlp_ratio"] * model["width"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.get("eps", 1e-6),
        "tie_word_embeddings": model["tie"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate),
    }


def _gpt_places(model: Mapping[str, Any]) -> dict[str, Place]:
    found = {
        "embed": Place("transformer.wte.weight"),
        "positions": Place("transformer.wpe.weight"),
        "norm/scale": Place("transformer.ln_f.weight"),
        "norm/bias": Place("transformer.ln_f.bias"),
    }
    if not model["tie"]:
        found["head"] = Place("lm_head.weight", transposed=True)
    for i in range(model["layers"]):
        own, their = f"layers_{i}", f"transformer.h.{i}"
        for j, name in enumerate("qkv"):
            found[f"{own}/attn/{name}"] = Place(f"{their}.attn.c_attn.weight", part=j, parts=3)
            found[f"{own}/attn/{name}/bias"] = Place(f"{their}.attn.c_attn.bias", part=j, parts=3)
        for ours, name in (("attn/o", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj")):
            found[f"{own}/{ours}"] = Place(f"{their}.{name}.weight")
            found[f"{own}/{ours}/bias"] = Place(f"{their}.{name}.bias")
        for ours, name in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            found[f"{own}/{ours}/scale"] = Place(f"{their}.{name}.weight")
            found[f"{own}/{ours}/bias"] = Place(f"{their}.{name}.bias")
    return found


# -- LLaMA -----------------------------------------------------------------------------------------------------------

_LLAMA_SIZES = {
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}


def _llama_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _LLAMA_DEFAULTS | {"num_key_value_heads": config.get("num_attention_heads", 32)}
    found: dict[str, Any] = _sizes(config, _LLAMA_SIZES, defaults)
    if found["heads"] % found["kv_heads"]:
        heads = f"it must divide num_attention_heads={found['heads']}"
        raise _refused("num_key_value_heads", found["kv_heads"], heads)
    size = found["width"] // found["heads"]
    if config.get("head_dim") not in (None, size):
        raise _refused("head_dim", config["head_dim"], f"it must be hidden_size / num_attention_heads = {size}")
    if size % 2:
        raise _refused("head_dim", size, "rotary positions need heads of even size")
    _only(config, "hidden_act", ("silu", "swish"))
    _only(config, "attention_bias", (False, None))
    _only(config, "mlp_bias", (False, None))
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise _refused("layer_types", config["layer_types"], "valid: 'full_attention' in every layer")
    found |= {"theta": _theta(config), "eps": _number(config, "rms_norm_eps", 1e-6)}
    return found | ({"tie": True, "tied_scale": 1.0} if _tie(config, False) else {})


def _theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary angles, from either generation of the field; scaled ones are refused."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise _refused(field, rope, "valid: null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused(field, dict(rope), "valid: unscaled rotary positions, rope_type 'default' or null")
    _only(config, "partial_rotary_factor", (1.0, None))
    return _number({"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}, "rope_theta", 10000.0)


def _mistral_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """As LLaMA's: its window matters only to texts longer than it, so the context ends there.

    A window that is left out is 4096 tokens, and so are 8 key and value heads.
    """
    missing = {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072}
    found = _llama_fields({**missing, **config})
    window = config.get("sliding_window", 4096)
    return found | ({"context": min(found["context"], window)} if window else {})


def _llama_theirs(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model[ours] for ours, name in _LLAMA_SIZES.items()} | {
        "head_dim": model["width"] // model["heads"],
        "hidden_act": "silu",
        "rms_norm_eps": model["eps"],
        "rope_theta": model["theta"],  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": model["theta"]},  # and by 5
        "tie_word_embeddings": model.get("tie", False),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def _mistral_theirs(model: Mapping[str, Any]) -> dict[str, Any]:
    return _llama_theirs(model) | {"sliding_window": None}


def _llama_places(model: Mapping[str, Any]) -> dict[str, Place]:
    found = {"embed": Place("model.embed_tokens.weight"), "norm/scale": Place("model.norm.weight")}
    if not model.get("tie", False):
        found["head"] = Place("lm_head.weight", transposed=True)
    for i in range(model["layers"]):
        own, their = f"layers_{i}", f"model.layers.{i}"
        for name in "qkvo":
            found[f"{own}/attn/{name}"] = Place(f"{their}.self_attn.{name}_proj.weight", transposed=True)
        for name in ("gate", "up", "down"):
            found[f"{own}/mlp/{name}"] = Place(f"{their}.mlp.{name}_proj.weight", transposed=True)
        found[f"{own}/attn_norm/scale"] = Place(f"{their}.input_layernorm.weight")
        found[f"{own}/mlp_norm/scale"] = Place(f"{their}.post_attention_layernorm.weight")
    return found


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "gpt",
        "GPT2LMHeadModel",
        _gpt_fields,
        _gpt_theirs,
        _gpt_places,
        root="transformer.",
        ignored=lambda name: name.endswith((".attn.bias", ".attn.masked_bias")),
    ),
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _llama_fields,
        _llama_theirs,
        _llama_places,
        root="model.",
        ignored=lambda name: name.endswith(".rotary_emb.inv_freq"),
    ),
}
FAMILIES["mistral"] = dataclasses.replace(
    FAMILIES["llama"], architecture="MistralForCausalLM", fields=_mistral_fields, theirs=_mistral_theirs
)
"""`model_type` of a config -> what it is."""
