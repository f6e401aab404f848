"""How weights that came from elsewhere go on training; `python -m experiments.convert` takes the model from the weights.

    python -m experiments.convert --from=path/to/gpt2 --rules="low_rank(rank=128)" --out=runs/gpt2_low_rank \\
        --config=configs/finetune.py --config.data.root=data/tokens --config.steps=2000
    python -m experiments.train --config=configs/stored.py:runs/gpt2_low_rank --workdir=runs/gpt2_low_rank

muP is off, and the learning rate is a common choice for dense weights of this kind, not one that we tuned: structured ones
may want more. Structures and all fields but those that a resumed run may change are fixed with the conversion.
"""

from structmat.training import config as defaults


def get_config(arg=None):
    config = defaults.default("lm")
    config.update(steps=1000, batch=8)
    config.optim.update(lr=3e-5, warmup=0.05, weight_decay=0.0)
    config.mup.enabled = False
    config.eval.batches = 50
    return config
