"""Next-token prediction on a corpus: bytes of the standard library by default, or a user's own text or tokens."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from structmat.data import batches, bigram, bytes_text, own
from structmat.data.corpus import Corpus
from structmat.data.errors import DataError
from structmat.training.applied import applied, with_auxiliary
from structmat.training.task import Batch, Source, Task, Variables
from structmat.training.tasks.lm_models import BYTES, MODELS


def defaults(model: str = "gpt") -> dict[str, Any]:
    """The fields of `config.model` and `config.data`."""
    return dict(
        model=dict(name=model, **MODELS[model].fields),
        data=dict(
            root="",  # '' is the standard library of this Python; else a folder of text or tokens, a .jsonl or a .npy of ids
            glob="**/*.txt",  # which files of a folder
        ),
    )


def check(config: Any) -> None:
    """Refuse sizes no model of this task can have."""
    MODELS[config.model.name].check(config)


def build(config: Any) -> Task:
    """The task of a checked config, all sites still dense."""
    m, choice = config.model, MODELS[config.model.name]
    tokens = jax.ShapeDtypeStruct((config.batch, m.context), jnp.int32)
    return Task(
        name="lm",
        model=choice.build(config),
        base=choice.base(config),
        example=(tokens,),
        batch={"tokens": jax.ShapeDtypeStruct((config.batch, m.context + 1), jnp.int32)},
        loss=loss,
        metric="bits_per_byte" if m.vocab == BYTES else "bits_per_token",
        unit="token",
        units=config.batch * m.context,
        other_flops=m.layers * 4 * m.context * m.width,
        load=lambda: load(config),
        logits=True,
    )


def loss(
    model: nn.Module, variables: Variables, batch: Batch, rng: jax.Array | None, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats of tokens `(batch, context + 1)` int32, and the same in bits."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    logits, extra = applied(model, variables, inputs, rng, train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    name = "bits_per_byte" if logits.shape[-1] == BYTES else "bits_per_token"
    metrics = {"loss": value, name: value / math.log(2), "count": jnp.float32(targets.size)}
    return with_auxiliary(value, metrics, extra)


def load(config: Any) -> Source:
    """Read the corpus.

    Raises:
      DataError: missing or malformed data, or token ids beyond model.vocab.
    """
    m = config.model
    corpus = _corpus(config.data.root, config.data.glob)
    if corpus.vocab_size > m.vocab:
        raise DataError(f"{corpus.description}: token ids reach {corpus.vocab_size - 1}, but model.vocab={m.vocab}")
    limit = config.eval.batches or None
    batches.heldout_batches(corpus.heldout, config.batch, m.context, limit)  # refuse a corpus too small now
    return Source(
        batch=lambda step, rows=None: batches.lm_batch(corpus.train, config.seed, step, config.batch, m.context, rows),
        heldout=lambda: batches.heldout_batches(corpus.heldout, config.batch, m.context, limit),
        sha256=corpus.sha256,
        description=corpus.description,
        reference=_reference(
            config.data.root, config.data.glob, limit * config.batch * m.context + 1 if limit else None
        ),
    )


@lru_cache(maxsize=2)
def _corpus(root: str, glob: str) -> Corpus:
    return own.load_tokens(root, glob) if root else bytes_text.load()


@lru_cache(maxsize=4)
def _reference(root: str, glob: str, scored: int | None) -> dict[str, float]:
    """The byte bigram on the held-out bytes the model is scored on."""
    corpus = _corpus(root, glob)
    if corpus.vocab_size > BYTES:
        return {}
    bits = bigram.bigram_bits_per_byte(corpus.train, corpus.heldout[:scored], vocab_size=corpus.vocab_size)
    return {"byte_bigram": bits}
