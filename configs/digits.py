"""A multi-layer perceptron on scikit-learn's digits; some seconds on a CPU.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/digits.py:"monarch(blocks=8)" --workdir=runs/digits_monarch

The argument is any structure for the hidden layers.
"""

from structmat.training import config as defaults


def get_config(arg=None):
    config = defaults.default("digits")
    config.structure = arg or "dense()"
    config.steps = 300
    config.batch = 64
    config.optim.lr = 3e-3
    return config
