"""Generate text from a trained language model, with a key-value cache.

python -m experiments.sample --workdir=runs/demo/arms/dense --prompt="def main(" --length=200
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli
from experiments.own_flags import OwnFlags
from structmat.models.decode import generate
from structmat.training.errors import RunError
from structmat.training.load import load_run

flags = OwnFlags()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of the lm task.")
PROMPT = flags.DEFINE_string("prompt", "def ", "Text to continue (UTF-8).")
LENGTH = flags.DEFINE_integer("length", 200, "Bytes to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the most likely byte.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)


def main() -> None:
    """Print the prompt and its continuation; beyond the context, the last half of it is the new prompt."""
    if not WORKDIR.value:
        cli.fail("--workdir is needed, such as --workdir=runs/demo/arms/dense")
    text = list(PROMPT.value.encode())
    if not text:
        cli.fail("--prompt must not be empty")
    run = load_run(WORKDIR.value)
    if run.config.task != "lm" or run.config.model.vocab != 256:
        raise RunError(f"{WORKDIR.value}: sampling needs the lm task on bytes, this run is task {run.config.task!r}")
    context, key, left = run.task.model.context, jax.random.key(SEED.value), LENGTH.value
    sys.stdout.write(PROMPT.value)
    while left:
        prompt = text[-max(1, context // 2) :]
        count = min(left, context - len(prompt))
        key, now = jax.random.split(key)
        new = generate(run.task.model, run.variables, jnp.array([prompt], jnp.int32), count, now, TEMPERATURE.value)
        text += np.asarray(new[0]).tolist()
        left -= count
        sys.stdout.write(bytes(text[-count:]).decode("utf-8", errors="replace"))
        sys.stdout.flush()
    print(f"\n[{run.step} steps, {run.config.structure}]", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, flags)
