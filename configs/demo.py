"""The demo: one small byte-level GPT with dense weights, with six structures at 0.3 of the dense parameters of every
linear site, and with fewer dense weights (`dense small`).

    make demo
    python -m experiments.compare --config=configs/demo.py --workdir=runs/demo

Eight to ten minutes on 2 CPU cores. The text is the standard library of the running Python.
"""

from ml_collections import ConfigDict

from structmat.training import config as defaults

STRUCTURES = (
    "fit(low_rank(), params=0.3)",
    "fit(monarch(order='blocked'), params=0.3)",
    "fit(block_tensor_train(order='blocked'), params=0.3)",
    "fit(kronecker(), params=0.3)",
    "fit(tensor_train(cores=3), params=0.3)",
    "fit(low_rank() + random_sparse(density=0.05), params=0.3)",
)


def get_config(arg=None):
    if arg:
        raise ValueError(f"configs/demo.py takes no argument, got {arg!r}; name structures with --structure")
    config = defaults.default("lm")
    config.steps = 1000
    config.eval.batches = 200
    config.compare = ConfigDict(dict(structures=STRUCTURES))
    return config
