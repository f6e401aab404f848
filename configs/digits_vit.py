"""A small vision transformer on scikit-learn's digits, in patches of 2 x 2 pixels; under a minute on 2 CPU cores.

    python -m experiments.train --config=configs/digits_vit.py --workdir=runs/digits_vit
    python -m experiments.train --config=configs/digits_vit.py:"monarch(blocks=4)" --workdir=runs/digits_vit_monarch

The argument is any structure for the encoder's layers.
"""

from structmat.training import config as defaults


def get_config(arg=None):
    config = defaults.default("images", "vit")
    config.structure = arg or "dense()"
    config.steps = 300
    config.batch = 64
    return config
