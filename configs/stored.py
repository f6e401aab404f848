"""The config a run was started with: configs/stored.py:path/to/run.

    python -m experiments.train --config=configs/stored.py:runs/gpt2 --workdir=runs/gpt2

goes on with a run whose flags are no longer at hand, or that `experiments.convert` made.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from structmat.training import checkpoint, manifest


def get_config(arg=None):
    if not arg:
        raise ValueError("configs/stored.py needs the folder of a run, such as configs/stored.py:runs/first")
    with checkpoint.Checkpointer(arg) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"configs/stored.py:{arg}: {str(Path(arg))!r} holds no checkpoint of a run")
        extra = manifest.read(checkpoints.folder / str(steps[-1])).extra
    return ConfigDict(json.loads(json.dumps(extra["config"])))
