"""Regression on a random network, fresh data at every step; some seconds on a CPU.

    python -m experiments.train --config=configs/teacher.py --workdir=runs/teacher
    python -m experiments.train --config=configs/teacher.py:"monarch(blocks=8)" --workdir=runs/teacher_monarch

The argument is any structure for the hidden layers but the first, which has 8 inputs.
"""

from structmat.training import config as defaults


def get_config(arg=None):
    config = defaults.default("teacher")
    config.structure = f"layers_[1-9] -> {arg}" if arg else "dense()"
    config.steps = 1000
    config.batch = 512
    config.optim.update(lr=4e-3, weight_decay=0.0)
    return config
