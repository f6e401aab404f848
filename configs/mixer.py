"""MLP-Mixer at its published sizes, 224 pixels in patches of 16, 1,000 classes: configs/mixer.py:s or :b.

    python -m experiments.train --config=configs/mixer.py:s --dry_run
    python -m experiments.train --config=configs/mixer.py:s --workdir=runs/mixer_s --config.data.root=path/to/images \\
        --config.structure="layers_.*/mlp/.* -> monarch(blocks=4, order='blocked')"

Sizes of Tolstikhin et al. (2021); batch, epochs (300 of ImageNet-1k), learning rate, warm-up and decay of the configs published
with Monarch (Dao et al. 2022), without their augmentation. muP is off.

`--config.data.root` is as for configs/vit.py.
"""

from structmat.training import config as defaults

EPOCH = 1_281_167
"""Training images of ImageNet-1k."""
SIZES = {
    # layers, width, tokens_hidden, batch
    "s": (8, 512, 256, 4096),
    "b": (12, 768, 384, 1024),
}


def get_config(arg=None):
    layers, width, tokens_hidden, batch = defaults.named(SIZES, arg, "configs/mixer.py")
    config = defaults.default("images", "mixer")
    config.steps = 300 * EPOCH // batch
    config.batch = batch
    config.model.update(classes=1000, size=224, patch=16, channels=3, layers=layers, width=width)
    config.model.update(tokens_hidden=tokens_hidden, dtype="bfloat16")
    config.optim.update(lr=2e-3, warmup=10.0 * EPOCH // batch, weight_decay=0.1, b2=0.999, clip=1.0)
    config.mup.enabled = False
    config.eval.every = 5000
    config.checkpoint.every = 1000
    return config
