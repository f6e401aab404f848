"""Operators on forced flow, 32 x 32, viscosity 1e-3, time 8; the data is solved for once.

    python -m experiments.train --config=configs/navier_stokes.py --workdir=runs/fno
    python -m experiments.train --config=configs/navier_stokes.py:tfno --workdir=runs/tfno
    python -m experiments.train --config=configs/navier_stokes.py:"layers_.*/spectral -> cp(rank=40)" --workdir=runs/cp
    python -m experiments.train --config=configs/navier_stokes.py:monarch --workdir=runs/monarch
    python -m experiments.train --config=configs/navier_stokes.py:unet --workdir=runs/unet
    python -m experiments.train --config=configs/navier_stokes.py:resnet --workdir=runs/resnet

The argument is one of these, or any structures for a Fourier neural operator; `tfno` keeps a tenth of its spectral weights.
Samples are solved for at 64 x 64, where all but `monarch`, which is bound to its grid, are evaluated too.
"""

from structmat.training import config as defaults

MODELS = {"fno": "fno", "tfno": "fno", "monarch": "monarch_operator", "unet": "unet", "resnet": "resnet"}
STRUCTURES = {"tfno": "layers_.*/spectral -> fit(tucker(), params=0.1)"}


def get_config(arg=None):
    arg = arg or "fno"
    if arg.isidentifier():
        defaults.named(MODELS, arg, "configs/navier_stokes.py")
    config = defaults.default("navier_stokes", MODELS.get(arg, "fno"))
    config.structure = STRUCTURES.get(arg, "dense()" if arg in MODELS else arg)
    config.steps = 500
    config.batch = 10
    config.optim.update(lr=4e-3, weight_decay=1e-4)
    config.model.width = 16 if arg in ("unet", "resnet") else 20
    config.mup.base_width = config.model.width
    config.data.update(solve_resolution=64, dt=0.01, fine=0 if arg == "monarch" else 64)
    return config
