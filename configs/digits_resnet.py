"""A small residual network on scikit-learn's digits; under a minute on 2 CPU cores.

    python -m experiments.train --config=configs/digits_resnet.py --workdir=runs/digits_resnet
    python -m experiments.train --config=configs/digits_resnet.py:"low_rank(rank=8)" --workdir=runs/digits_resnet_low_rank

The argument is any structure for the 3 x 3 convolutions of the blocks.
"""

from structmat.training import config as defaults


def get_config(arg=None):
    config = defaults.default("images", "resnet")
    if arg:
        config.structure = f"layers_.*/conv. -> {arg}"
    config.steps = 300
    config.batch = 64
    config.mup.base_width = 16
    return config
