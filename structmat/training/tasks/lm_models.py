"""The language models: the fields of each in a config, and how it is built from them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from structmat.models import GPT, Llama
from structmat.training.errors import ConfigError
from structmat.training.model_choice import ModelChoice, at_least_one, divides

BYTES = 256
GPT_SIZES = ("vocab", "context", "layers", "width", "heads", "mlp_ratio")
LLAMA_SIZES = ("vocab", "context", "layers", "width", "heads", "kv_heads", "hidden")
SHARED = dict(
    dropout=0.0,
    scan=True,  # stack and scan equal adjacent layers: compiles faster
    remat="none",  # none | full | dots: recompute activations in the backward pass
    dtype="float32",  # compute dtype; parameters stay float32
)


def check_gpt(config: Any) -> None:
    """Refuse sizes no GPT can have."""
    at_least_one(config.model, [name for name in GPT_SIZES if name != "vocab"])
    _check_tokens(config.model)
    _above_zero(config.model, ("eps", "tied_scale"))


def build_gpt(config: Any) -> GPT:
    """The module; without muP tied logits have variance 1 at the start, as in the standard parametrisation."""
    m = config.model
    return GPT(
        **{name: m[name] for name in (*GPT_SIZES, "dropout", "tie", "scan", "remat")},
        tied_scale=m.get("tied_scale", None if config.mup.enabled else m.width**-0.5),
        eps=m.get("eps", 1e-6),
        dtype=jnp.dtype(m.dtype),
    )


def check_llama(config: Any) -> None:
    """Refuse sizes no LLaMA can have."""
    m = config.model
    at_least_one(m, [name for name in LLAMA_SIZES if name != "vocab"])
    _check_tokens(m)
    divides(m, "kv_heads", "heads")
    if m.width // m.heads % 2:
        rule = f"must leave heads of even size for rotary positions; model.width={m.width} over them is {m.width // m.heads}"
        raise ConfigError("model.heads", m.heads, rule)
    _above_zero(m, ("theta", "eps", "tied_scale"))
    if config.mup.base_width % 2:
        raise ConfigError("mup.base_width", config.mup.base_width, "must be even, for rotary positions")


def build_llama(config: Any) -> Llama:
    """The module."""
    m = config.model
    return Llama(
        **{name: m[name] for name in (*LLAMA_SIZES, "theta", "eps", "dropout", "scan", "remat")},
        tie=m.get("tie", False),
        tied_scale=m.get("tied_scale", None if config.mup.enabled else m.width**-0.5),
        dtype=jnp.dtype(m.dtype),
    )


def base_llama(config: Any) -> Llama:
    """The module at the base width, its hidden units in proportion."""
    m, width = config.model, config.mup.base_width
    hidden = max(1, round(m.hidden * width / m.width))
    return build_llama(config).clone(width=width, hidden=hidden, heads=1, kv_heads=1)


def _above_zero(m: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if m.get(name, 1.0) <= 0:
            raise ConfigError(f"model.{name}", m[name], "must be above 0")


def _check_tokens(m: Any) -> None:
    if m.vocab < 2:
        raise ConfigError("model.vocab", m.vocab, "must be at least 2", f"{BYTES} for bytes")
    divides(m, "heads", "width")


MODELS = {
    "gpt": ModelChoice(
        fields=dict(
            layers=2,
            width=128,
            heads=4,
            context=64,
            mlp_ratio=4,
            vocab=BYTES,  # number of token ids; 256 for bytes
            tie=False,  # the head is the transposed embedding
            **SHARED,
        ),
        check=check_gpt,
        build=build_gpt,
        base=lambda config: build_gpt(config).clone(width=config.mup.base_width, heads=1),
        optional=dict(
            eps=1e-6,  # of LayerNorm
            tied_scale=1.0,  # factor on the logits of a tied head; left out 1 / width with muP, else 1 / sqrt(width)
        ),
    ),
    "llama": ModelChoice(
        fields=dict(
            layers=2,
            width=128,
            heads=4,
            kv_heads=4,  # key and value heads, a divisor of heads
            hidden=344,  # units of the gated MLP
            context=64,
            vocab=BYTES,  # number of token ids; 256 for bytes
            theta=10000.0,  # base of the rotary angles
            eps=1e-6,  # of RMSNorm
            **SHARED,
        ),
        check=check_llama,
        build=build_llama,
        base=base_llama,
        optional=dict(
            tie=False,  # the head is the transposed embedding
            tied_scale=1.0,  # as in gpt
        ),
    ),
}
