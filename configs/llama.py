"""LLaMA pre-training at the sizes of GaLore and SLTrain: configs/llama.py:60m, :130m, :350m, :1b or :7b.

    python -m experiments.train --config=configs/llama.py:60m --dry_run
    python -m experiments.train --config=configs/llama.py:350m --workdir=runs/sltrain_350m \\
        --config.structure="low_rank(rank=256) + random_sparse(density=0.03)" --config.mesh.fsdp=16
    python -m experiments.train --config=configs/llama.py:60m --workdir=runs/tiny --config.batch=8 \\
        --config.steps=100 --config.model.context=64 --config.mup.enabled

Sizes as in GaLore's model files (Zhao et al. 2024); batch, steps, warm-up, learning rate and precision as in the scripts
of SLTrain (Han et al. 2024), tuned there for low rank plus sparse: tune `optim.lr` before quoting dense. These scripts set
no context: 256 is our choice, the default of the program that they start. muP is off, as in the papers. SLTrain trains 7B
with 8-bit moments, here they are f32.

1b has 5461 hidden units = 43 x 127, which no mesh axis and few structures divide: the MLP stays whole along `tensor`
(the planner warns), and Monarch, block tensor train and Kronecker need `--config.model.hidden=5504` (+0.5% parameters),
the next multiple of 128.

Without `--config.data.root` the text is the bytes of the standard library, of which 256 of the 32,000 ids occur; `python -m experiments.tokenize`
makes a folder of tokens from a text and a vocabulary.
"""

from structmat.training import config as defaults

SIZES = {
    #       layers, width, hidden, heads, steps, warm-up
    "60m": (8, 512, 1376, 8, 11_000, 1_100),
    "130m": (12, 768, 2048, 12, 22_000, 2_200),
    "350m": (24, 1024, 2736, 16, 65_000, 6_500),
    "1b": (24, 2048, 5461, 32, 140_000, 10_000),
    "7b": (32, 4096, 11008, 32, 150_000, 15_000),
}


def get_config(arg=None):
    layers, width, hidden, heads, steps, warmup = defaults.named(SIZES, arg, "configs/llama.py")
    config = defaults.default("lm", "llama")
    config.steps = steps
    config.batch = 512
    config.model.update(layers=layers, width=width, hidden=hidden, heads=heads, kv_heads=heads)
    config.model.update(vocab=32000, context=256, dtype="bfloat16", remat="none" if arg in ("60m", "130m") else "full")
    config.optim.update(lr=3e-3, warmup=float(warmup), weight_decay=0.0, clip=1.0 if arg == "7b" else 0.0, b2=0.999)
    config.mup.enabled = False
    config.eval.update(every=1000, batches=4)
    config.checkpoint.every = 1000
    return config
