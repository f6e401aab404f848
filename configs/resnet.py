"""ResNets with batch normalisation at their published sizes: configs/resnet.py:20, :32, :18 or :50.

    python -m experiments.train --config=configs/resnet.py:50 --dry_run
    python -m experiments.train --config=configs/resnet.py:20 --workdir=runs/resnet20 --config.data.root=path/to/cifar10 \\
        --config.method="trp(every=5, energy=0.9, nuclear=0.0003, only='layers_.*')" \\
        --config.switch="end: layers_.*/conv./conv -> fit(low_rank(), params=0.3)"

Sizes of He et al. (2016). 20 and 32 are for CIFAR-10, with rate, decay, batch, epochs and drops of the code of "Trained Rank
Pruning"; 18 and 50 for ImageNet-1k, with those of the code of "Sparse-IFT" and of "Rigging the Lottery", without the random sizes
of their crops. The batch of 18 is theirs of 32 a device on 8 devices, a number we assume. SGD with momentum; muP is off. Running
statistics are taken anew at the end, over 100 batches.

`--config.data.root` is as for configs/vit.py, with images of side 32 or 224.
"""

from structmat.training import config as defaults

CIFAR, IMAGENET = 50_000, 1_281_167
"""Training images."""


def _sgd(steps, batch, **optim):
    config = defaults.default("images", "resnet_v1")
    config.update(steps=steps, batch=batch)
    config.optim.update(name="sgd", warmup=0.0, clip=0.0)
    config.optim.update(optim)
    config.mup.enabled = False
    config.checkpoint.every = 1000
    config.eval.recalibrate = 100
    return config


def _cifar(depth):
    """Drops at epochs 81 and 122 of 164."""
    config = _sgd(164 * CIFAR // 128, 128, lr=0.1, schedule="steps", drops="0.4939, 0.7439", weight_decay=1e-4)
    config.model.update(depth=depth, size=32, channels=3, width=16)
    config.data.update(crop=4, flip=True)
    return config


def _imagenet(depth, steps, batch, **optim):
    config = _sgd(steps, batch, **optim)
    config.model.update(depth=depth, size=224, channels=3, width=64, classes=1000, large=True, dtype="bfloat16")
    config.data.update(flip=True, smoothing=0.1)
    config.eval.every = 5000
    return config


def _18():
    return _imagenet(18, 90 * IMAGENET // 256, 256, lr=0.256, b1=0.875, weight_decay=2.0**-15)


def _50():
    """Drops at epochs 30, 70 and 90 of 102."""
    steps = dict(schedule="steps", drops="0.2933, 0.6843, 0.8798")
    return _imagenet(50, 32_000, 4096, name="sgd_nesterov", lr=1.6, weight_decay=1e-4, **steps)


SIZES = {"20": lambda: _cifar(20), "32": lambda: _cifar(32), "18": _18, "50": _50}


def get_config(arg=None):
    return defaults.named(SIZES, arg, "configs/resnet.py")()
