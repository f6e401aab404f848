"""ViT at its published sizes, 224 pixels in patches of 16, 1,000 classes: configs/vit.py:s, :b or :s768.

    python -m experiments.train --config=configs/vit.py:b --dry_run
    python -m experiments.train --config=configs/vit.py:s --workdir=runs/vit_s --config.data.root=path/to/images \\
        --config.structure="layers_.*/mlp/.* -> monarch(blocks=4, order='blocked')"

Sizes of Dosovitskiy et al. (2021) and DeiT (Touvron et al. 2021); batch, epochs (300 of ImageNet-1k), learning rate, warm-up
and decay of DeiT, without its augmentation. s768 is the ViT-S of Monarch's experiments (Dao et al. 2022): fewer, wider layers.
muP is off.

`--config.data.root` is a folder of train_images.npy (n, 224, 224, 3) uint8, train_labels.npy, test_images.npy and
test_labels.npy; without it the images are scikit-learn's digits, enlarged.
"""

from structmat.training import config as defaults

SIZES = {
    # layers, width, heads, mlp_ratio
    "s": (12, 384, 6, 4),
    "b": (12, 768, 12, 4),
    "s768": (8, 768, 8, 3),
}


def get_config(arg=None):
    layers, width, heads, ratio = defaults.named(SIZES, arg, "configs/vit.py")
    config = defaults.default("images", "vit")
    config.steps = 375_000
    config.batch = 1024
    config.model.update(classes=1000, size=224, patch=16, channels=3, layers=layers, width=width, heads=heads)
    config.model.update(mlp_ratio=ratio, dtype="bfloat16")
    config.optim.update(lr=1e-3, warmup=6250.0, weight_decay=0.05, b2=0.999, clip=0.0)
    config.mup.enabled = False
    config.eval.every = 5000
    config.checkpoint.every = 1000
    return config
