"""GPT-2 at its published sizes: configs/gpt2.py:small, :medium or :large.

    python -m experiments.train --config=configs/gpt2.py:small --dry_run
    python -m experiments.train --config=configs/gpt2.py:small --workdir=runs/gpt2_monarch \\
        --config.structure="fit(monarch(order='blocked'), params=0.25)"

Sizes, context, vocabulary and tied head of Radford et al. (2019); the schedule is the common one for training them from
scratch: 512 sequences of 1,024 tokens, AdamW at 6e-4 (small), 3e-4 or 2.5e-4, 1% warm-up, cosine. muP is off.

50,257 ids = 29 x 1733, which no mesh axis divides, so the embedding stays whole along `tensor` (the planner warns);
`--config.model.vocab=50304` is the next multiple of 128.

Without `--config.data.root` the text is the bytes of the standard library, of which 256 of the ids occur; `python -m experiments.tokenize`
makes a folder of tokens from a text and a vocabulary.
"""

from structmat.training import config as defaults

SIZES = {
    #         layers, width, heads, learning rate
    "small": (12, 768, 12, 6e-4),
    "medium": (24, 1024, 16, 3e-4),
    "large": (36, 1280, 20, 2.5e-4),
}


def get_config(arg=None):
    layers, width, heads, lr = defaults.named(SIZES, arg, "configs/gpt2.py")
    config = defaults.default("lm", "gpt")
    config.steps = 100_000
    config.batch = 512
    config.model.update(layers=layers, width=width, heads=heads, context=1024, vocab=50257, tie=True)
    config.model.update(dtype="bfloat16", remat="full")
    config.optim.update(lr=lr, warmup=0.01)
    config.mup.enabled = False
    config.eval.update(every=1000, batches=4)
    config.checkpoint.every = 1000
    return config
