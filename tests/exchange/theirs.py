"""Tiny random models of transformers, saved as they save them, and their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, CONTEXT = 96, 24
SIZES = {
    "gpt2": dict(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "llama": dict(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}
SIZES["mistral"] = SIZES["llama"]


def save_theirs(folder: Path, kind: str, *, shard: str = "1GB", dtype: str = "float32", **fields: Any) -> Any:
    """Save a model with every parameter drawn anew (scales near 1), and return it in f32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES[kind] | fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = value.ndim == 1 and name.endswith("weight")
            value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.1) + (1 if scale else 0))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return load_theirs(folder)


def load_theirs(folder: Path) -> Any:
    """The model of a folder in f32, whatever its files hold; its tables of angles, too, which a cast would round."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """f32 `(batch, length, vocab)`."""
    import torch

    with torch.no_grad():
        return model.eval().float()(torch.tensor(tokens)).logits.numpy()


def tokens_of(batch: int = 2, length: int = CONTEXT) -> np.ndarray:
    """Random ids."""
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length))


def write_ids(path: Path) -> Path:
    """A corpus of random ids."""
    np.save(path, np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.uint16))
    return path


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json of `VOCAB` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
