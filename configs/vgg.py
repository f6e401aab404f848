"""VGG with batch normalisation on CIFAR-10: configs/vgg.py:19, :16, :13 or :11.

    python -m experiments.train --config=configs/vgg.py:19 --dry_run
    python -m experiments.train --config=configs/vgg.py:19 --workdir=runs/vgg19 --config.data.root=path/to/cifar10 \\
        --config.structure="layers_.*/conv -> ordered()" --config.method="maestro(every=390, lasso=1e-6)"

Layouts of Simonyan and Zisserman (2015) with one linear layer at the end; rate, momentum, decay, batch, epochs and drops of the
code of "Maestro" for it. SGD with momentum; muP is off. Running statistics are taken anew at the end, over an epoch.

`--config.data.root` is as for configs/vit.py, with images of side 32.
"""

from structmat.training import config as defaults

EPOCHS, IMAGES, BATCH = 300, 50_000, 128
DEPTHS = {"19": 19, "16": 16, "13": 13, "11": 11}


def get_config(arg=None):
    config = defaults.default("images", "vgg")
    config.update(steps=EPOCHS * IMAGES // BATCH, batch=BATCH)
    config.model.update(depth=defaults.named(DEPTHS, arg, "configs/vgg.py"), channels=3)
    config.optim.update(
        name="sgd", lr=0.1, schedule="steps", drops="0.5, 0.75", warmup=0.0, weight_decay=1e-4, clip=0.0
    )
    config.data.update(crop=4, flip=True)
    config.mup.enabled = False
    config.eval.recalibrate = IMAGES // BATCH
    config.checkpoint.every = 1000
    return config
