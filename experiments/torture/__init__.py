"""What a run survives, measured: one small file per figure, see `experiments.torture.figures` for how to add one.

Hosts and processes are what is tried here, so jax is kept to CPU devices, in children too.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
