"""Generate text from a trained language model, with a key-value cache.

python -m experiments.sample --workdir=runs/demo/arms/dense --prompt="def main(" --length=200

A model of tokens needs its tokenizer: a run that experiments.convert made has it, for others give `--tokenizer`, a Hugging
Face tokenizer.json or a folder with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.own_flags import OwnFlags
from experiments.tokenize import load_tokenizer
from structmat.exchange.huggingface import KEPT
from structmat.models.decode import generate
from structmat.training.errors import RunError
from structmat.training.load import Run, load_run
from structmat.training.tasks.lm_models import BYTES

flags = OwnFlags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of the lm task.")
PROMPT = flags.DEFINE_string("prompt", "def ", "Text to continue (UTF-8).")
LENGTH = flags.DEFINE_integer("length", 200, "Bytes or tokens to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the most likely one.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Of a model of tokens; default the one kept with the run, if any.")


def coder(
    run: Run, workdir: str, tokenizer: str | None
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """(text to ids, ids to text): bytes as UTF-8, or the tokenizer that is given or kept with the run.

    Raises:
      RunError: neither, or a vocabulary beyond the model's. DataError: as `load_tokenizer`.
    """
    vocab = run.config.model.vocab
    kept = Path(workdir) / KEPT
    if tokenizer is None and vocab == BYTES:
        return lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", errors="replace")
    if tokenizer is None and not any((kept / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise RunError(
            f"{workdir}: the model is of {vocab:,} tokens and no tokenizer is kept with it; give --tokenizer"
        )
    made, _ = load_tokenizer(kept if tokenizer is None else Path(tokenizer))
    if made.get_vocab_size() > vocab:
        raise RunError(f"the tokenizer has {made.get_vocab_size():,} tokens and the model {vocab:,}; give its own")
    return lambda text: made.encode(text).ids, lambda ids: made.decode(ids)


def main() -> None:
    """Print the prompt and its continuation; beyond the context, the last half of it is the new prompt."""
    if not WORKDIR.value:
        cli.fail("--workdir is needed, such as --workdir=runs/demo/arms/dense")
    if not PROMPT.value:
        cli.fail("--prompt must not be empty")
    run = load_run(WORKDIR.value)
    if run.config.task != "lm":
        raise RunError(f"{WORKDIR.value}: sampling needs the lm task, this run is task {run.config.task!r}")
    encode, decode = coder(run, WORKDIR.value, TOKENIZER.value)
    ids = encode(PROMPT.value)
    if not ids:
        cli.fail(f"--prompt={PROMPT.value!r} has no tokens")
    context, key, left = run.task.model.context, jax.random.key(SEED.value), LENGTH.value
    sys.stdout.write(PROMPT.value)
    shown = decode(ids)
    while left:
        prompt = ids[-max(1, context // 2) :]
        count = min(left, context - len(prompt))
        key, now = jax.random.split(key)
        new = generate(run.task.model, run.variables, jnp.array([prompt], jnp.int32), count, now, TEMPERATURE.value)
        ids += np.asarray(new[0]).tolist()
        left -= count
        text = decode(ids)  # all of it, for what stands between two tokens is in neither
        sys.stdout.write(text[len(shown) :])
        shown = text
        sys.stdout.flush()
    print(f"\n[{run.step} steps, {run.config.structure}]", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, flags)
