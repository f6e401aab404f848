"""A small byte-level GPT on the standard library of the running Python; about a minute on 2 CPU cores.

    python -m experiments.train --config=configs/demo_lm.py --workdir=runs/dense
    python -m experiments.train --config=configs/demo_lm.py:monarch --workdir=runs/monarch
    python -m experiments.train --config=configs/demo_lm.py:"low_rank(rank=16)" --workdir=runs/low_rank

The argument is a preset below or any structure; the presets keep 0.3 of the dense parameters of every linear site.
"""

from structmat.training import config as defaults

PRESETS = {
    "dense": "dense()",
    "low_rank": "fit(low_rank(), params=0.3)",
    "monarch": "fit(monarch(order='blocked'), params=0.3)",
    "kronecker": "fit(kronecker(), params=0.3)",
}


def get_config(arg=None):
    config = defaults.default("lm")
    config.structure = PRESETS.get(arg, arg) if arg else PRESETS["dense"]
    return config
